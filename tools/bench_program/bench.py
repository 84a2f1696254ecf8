#!/usr/bin/env python3
"""bench: the library beside raw sockets, bare cpp-httplib, etcd's lock service and etcd's Go client.

An etcd of its own with its data in memory; the contenders in turn, A B C A B C; each measurement in
a process of its own; medians of the rounds. tools/bench builds what this needs, and runs it.
"""
import argparse
import collections
import datetime
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
NAMES = {"raw": "raw", "bare": "bare", "service": "etcd's lock", "go": "Go", "ours": "ours"}

# A row of the table is one figure of one of these. `stretch`: how much longer it is measured than
# others; `least`: how many of something --quick does with; `fresh`: on an etcd without the past.
Work = collections.namedtuple(
    "Work", "name text work n contenders figures tls stretch least fresh")

# Figure: what it is called, the unit in which it is shown, and by what it is divided for that.
FIGURES = {
    ("time", "p50"): ("p50", "µs", 1),
    ("time", "p99"): ("p99", "µs", 1),
    ("slow", "p50"): ("p50", "ms", 1000),
    ("rate", "rate"): ("", "/s", 1),
    ("cpu", "cpu"): ("client CPU a call", "µs", 1),
    ("steady", "cpu"): ("client CPU", "ms/s", 1),
    ("count", "allocations"): ("heap allocations", "", 1),
    ("count", "handshakes"): ("TLS handshakes a call", "", 1),
    ("count", "seconds"): ("until each had an event", "s", 1),
    ("count", "mb"): ("memory", "MB", 1),
    ("count", "threads"): ("threads", "", 1),
}


def work(name, text, kind, n, contenders, figures, tls=False, stretch=1, least=None, fresh=False):
    figures = [tuple(figure.split(".")) for figure in figures.split()]
    return Work(name, text, kind, n, contenders.split(), figures, tls, stretch, least or n, fresh)


ALL = "raw bare go ours"
ONE = "time.p50 time.p99 cpu.cpu count.allocations"
TLS = "time.p50 count.handshakes"
WORKS = [
    work("put", "put, 1 thread", "put", 1, ALL, ONE),
    work("get", "get, 1 thread", "get", 1, ALL, ONE),
    work("put8", "put, 8 threads", "put", 8, ALL, "rate.rate cpu.cpu"),
    work("put64", "put, 64 threads", "put", 64, ALL, "rate.rate cpu.cpu"),
    work("get8", "get, 8 threads", "get", 8, ALL, "rate.rate cpu.cpu"),
    work("get64", "get, 64 threads", "get", 64, ALL, "rate.rate cpu.cpu"),
    work("lock", "lock + unlock alone", "lock", 1, "raw service go ours",
         "time.p50 time.p99 count.allocations"),
    work("handover2", "hand-overs, 2 contenders", "handover", 2, "service go ours", "rate.rate"),
    work("handover10", "hand-overs, 10 contenders", "handover", 10, "service go ours",
         "rate.rate"),
    work("waiter3", "unlock → waiter, after 3 ms", "waiter", 3, "service go ours", "slow.p50"),
    work("waiter20", "unlock → waiter, after 20 ms", "waiter", 20, "service go ours", "slow.p50"),
    work("waiter50", "unlock → waiter, after 50 ms", "waiter", 50, "service go ours", "slow.p50"),
    work("event", "put → event, 1 watch", "event", 1, ALL, "time.p50"),
    work("event1000", "put → event, 1,000 watches", "event", 1000, "raw go ours", "time.p50"),
    work("watches", "10,000 watches", "watches", 10000, "raw go ours",
         "count.seconds count.mb count.threads", least=200, fresh=True),
    work("leases1000", "1,000 leases", "leases", 1000, "go ours", "steady.cpu count.threads",
         stretch=5, least=50, fresh=True),
    work("leases10000", "10,000 leases", "leases", 10000, "go ours", "steady.cpu count.threads",
         stretch=5, least=200, fresh=True),
    work("connect", "connect, one put, close", "connect", 1, ALL, "time.p50 cpu.cpu"),
    work("tls_put", "TLS: put, 1 thread", "put", 1, "bare go ours", TLS, tls=True),
    work("tls_get", "TLS: get, 1 thread", "get", 1, "bare go ours", TLS, tls=True),
    work("tls_put64", "TLS: put, 64 threads", "put", 64, "bare go ours",
         "rate.rate cpu.cpu count.handshakes", tls=True),
    work("tls_lock", "TLS: lock + unlock alone", "lock", 1, "service go ours", TLS, tls=True),
    work("tls_handover2", "TLS: hand-overs, 2 contenders", "handover", 2, "service go ours",
         "rate.rate count.handshakes", tls=True),
    work("tls_connect", "TLS: connect, one put, close", "connect", 1, "bare go ours", TLS,
         tls=True),
]

# What must be shown: the text, what is measured (ours first), how it is to compare, with what.
# A value is "work.figure.contender".
DEMANDS = [
    ("get p50, 1 thread: ours / bare", "get.p50.ours", "get.p50.bare", "<=", 1.05),
    ("put p50, 1 thread: ours / bare", "put.p50.ours", "put.p50.bare", "<=", 1.05),
    ("client CPU a get: ours / bare", "get.cpu.ours", "get.cpu.bare", "<=", 1.0),
    ("client CPU a put: ours / bare", "put.cpu.ours", "put.cpu.bare", "<=", 1.0),
    ("put/s, 64 threads: ours / bare", "put64.rate.ours", "put64.rate.bare", ">=", 2.0),
    ("put/s, 64 threads: ours / Go", "put64.rate.ours", "put64.rate.go", ">=", 0.9),
    ("get/s, 64 threads: ours / bare", "get64.rate.ours", "get64.rate.bare", ">=", 1.5),
    ("get/s, 64 threads: ours / Go", "get64.rate.ours", "get64.rate.go", ">=", 1.0),
    ("lock + unlock: ours / two raw Txns", "lock.p50.ours", "lock.p50.raw", "<=", 1.15),
    ("hand-over, 2 contenders: ours / Go", "handover2.rate.ours", "handover2.rate.go", ">=", 12),
    ("hand-over, 10 contenders: ours / Go", "handover10.rate.ours", "handover10.rate.go", ">=", 4),
    ("unlock → waiter after 3 ms / put → event", "waiter3.p50.ours", "event.p50.ours", "<=", 1.5),
    ("unlock → waiter after 20 ms / put → event", "waiter20.p50.ours", "event.p50.ours", "<=",
     1.5),
    ("unlock → waiter after 50 ms / put → event", "waiter50.p50.ours", "event.p50.ours", "<=",
     1.5),
    ("put → event: ours / raw", "event.p50.ours", "event.p50.raw", "<=", 1.15),
    ("10,000 watches: ours / Go's time", "watches.seconds.ours", "watches.seconds.go", "<=", 1.2),
    ("10,000 watches, MB", "watches.mb.ours", None, "<=", 30),
    ("10,000 leases, client CPU ms/s", "leases10000.cpu.ours", None, "<=", 30),
    ("TLS handshakes a contended acquire", "tls_handover2.handshakes.ours", None, "<", 1),
]


def output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


class Etcd:
    """One etcd with its data in memory, plain or with TLS."""

    def __init__(self, program, tls):
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.program, self.process = program, None
        self.folder = tempfile.mkdtemp(prefix="coordination-bench-", dir=memory)
        self.ca = self.make_certificate() if tls else None
        self.start()

    def make_certificate(self):
        """Signed by itself; etcd's gateway also shows it to itself as a client's."""
        certificate = os.path.join(self.folder, "server.pem")
        subprocess.run(
            ["openssl", "req", "-x509", "-days", "2", "-newkey", "ec", "-pkeyopt",
             "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=127.0.0.1", "-addext",
             "subjectAltName=IP:127.0.0.1", "-addext", "extendedKeyUsage=serverAuth,clientAuth",
             "-keyout", os.path.join(self.folder, "server.key"), "-out", certificate],
            check=True, capture_output=True)
        return certificate

    def start(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"{'https' if self.ca else 'http'}://127.0.0.1:{port}"
        peer = "unix://peer:1"
        flags = ["--name=bench", "--data-dir=data", "--logger=zap", "--log-outputs=stderr",
                 f"--listen-client-urls={self.url}", f"--advertise-client-urls={self.url}",
                 f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}",
                 f"--initial-cluster=bench={peer}"]
        if self.ca:
            flags += ["--cert-file=server.pem", "--key-file=server.key"]
        log = os.path.join(self.folder, "etcd.log")
        with open(log, "wb") as sink:
            self.process = subprocess.Popen([self.program, *flags], cwd=self.folder, stdout=sink,
                                            stderr=sink)
        end = time.monotonic() + 60
        while "serving" not in open(log, encoding="utf-8").read():
            if self.process.poll() is not None or time.monotonic() > end:
                sys.exit("etcd does not start:\n" + open(log, encoding="utf-8").read())
            time.sleep(0.02)

    def stop(self):
        self.process.kill()
        self.process.wait()

    def restart(self):
        self.stop()
        shutil.rmtree(os.path.join(self.folder, "data"))
        self.start()

    def close(self):
        self.stop()
        shutil.rmtree(self.folder)


class Bench:
    def __init__(self, options):
        self.options = options
        self.etcds = {}
        self.values = {}  # (work, figure, contender) -> the value of each round
        self.failures = []

    def etcd(self, tls):
        if tls not in self.etcds:
            self.etcds[tls] = Etcd(self.options.etcd, tls)
        return self.etcds[tls]

    def measure(self, row, contender):
        etcd = self.etcd(row.tls)
        if row.fresh and not self.options.quick:
            etcd.restart()
        options = self.options
        program = [options.go] if contender == "go" else [options.worker, contender]
        n = row.least if options.quick else row.n
        command = [*program, row.work, etcd.url, str(options.seconds * row.stretch), str(n)]
        try:
            done = subprocess.run(command + ([etcd.ca] if etcd.ca else []), text=True,
                                  capture_output=True, timeout=300, check=False)
            error = done.stderr.strip() if done.returncode else ""
        except subprocess.TimeoutExpired:
            error = "not done in 300 s"
        if error:
            print(f"{row.name}, {contender}: {error}", file=sys.stderr)
            return self.failures.append(f"{row.name}, {contender}: {error}")
        for line in done.stdout.splitlines():
            figure, value = line.split()
            self.values.setdefault((row.name, figure, contender), []).append(float(value))

    def run(self, rows):
        for row in rows:
            contenders = [c for c in row.contenders if c != "go" or self.options.go]
            for number in range(self.options.rounds):
                for contender in contenders:
                    print(f"{row.name} {number + 1}/{self.options.rounds} {contender}",
                          file=sys.stderr)
                    self.measure(row, contender)

    def median(self, path):
        values = self.values.get(tuple(path.split(".")))
        return statistics.median(values) if values else None

    def close(self):
        for etcd in self.etcds.values():
            etcd.close()


def ratio(value, reference):
    return None if value is None or not reference else value / reference


def show(value):
    if value is None:
        return "–"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def spread(values):
    """Largest less smallest, in parts of the median."""
    middle = statistics.median(values) if values else 0
    return f"{100 * (max(values) - min(values)) / middle:.0f} %" if middle else "–"


def lines_of(bench, rows):
    """What the table and the plot show: a dict for each figure of each row."""
    for row in rows:
        for kind, figure in row.figures:
            what, unit, divisor = FIGURES[kind, figure]
            if kind == "time" and row.work == "connect":
                unit, divisor = "ms", 1000
            values = {c: [v / divisor for v in bench.values[row.name, figure, c]]
                      for c in NAMES if (row.name, figure, c) in bench.values}
            text = ", ".join(filter(None, [row.text, what])) + (f" ({unit})" if unit else "")
            yield {"row": row.name, "figure": figure, "text": text, "unit": unit,
                   "more_is_better": kind == "rate", "rounds": values,
                   "median": {c: statistics.median(v) for c, v in values.items()},
                   "expected": row.contenders}


def table(lines):
    yield "| work | " + " | ".join(NAMES.values()) + " | spread | / raw | / bare | / Go |"
    yield "|---" * (len(NAMES) + 5) + "|"
    for line in lines:
        medians = line["median"]
        cells = [line["text"], *(show(medians.get(c)) for c in NAMES)]
        cells.append(spread(line["rounds"].get("ours", [])))
        cells += [show(ratio(medians.get("ours"), medians.get(c))) for c in ("raw", "bare", "go")]
        yield "| " + " | ".join(cells) + " |"


def judged(bench):
    """Each demand with what was measured, where it was."""
    for text, path, other, sign, demanded in DEMANDS:
        value = bench.median(path)
        if other:
            value = ratio(value, bench.median(other))
        good = None
        if value is not None:
            good = {"<=": value <= demanded, ">=": value >= demanded, "<": value < demanded}[sign]
        yield {"text": text, "measured": value, "demanded": f"{sign} {demanded}", "met": good}


def demands_table(demands):
    yield "| it must show | measured | demanded | |"
    yield "|---|---|---|---|"
    words = {None: "not measured", True: "yes", False: "NO"}
    for demand in demands:
        yield (f"| {demand['text']} | {show(demand['measured'])} | {demand['demanded']} | "
               f"{words[demand['met']]} |")


def httplib_version():
    text = output("sh", "-c", "echo '#include <httplib.h>' | c++ -E -dM -x c++ -")
    found = re.search(r'CPPHTTPLIB_VERSION "(.+)"', text)
    if found:
        return found[1]
    return output("pkg-config", "--modversion", "cpp-httplib").strip() or "unknown"


def facts(options):
    module = open(os.path.join(HERE, "go", "go.mod"), encoding="utf-8").read()
    client = re.search(r"client/v3 (v\S+)", module)[1]
    return {
        "date": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        "etcd": re.search(r"Version: (\S+)", output(options.etcd, "--version"))[1],
        "cpp-httplib": httplib_version(),
        "compiler": (output("c++", "--version").splitlines() or ["unknown"])[0],
        "Go": f"{output('go', 'version').strip()}, clientv3 {client}" if options.go else "SKIPPED",
        "cores": os.cpu_count(),
        "load at the start": round(os.getloadavg()[0], 2),
        "rounds": options.rounds,
        "seconds each": options.seconds,
    }


def parse():
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", action="append", metavar="NAME", default=[],
                        help="these rows only: " + ", ".join(row.name for row in WORKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2, help="of one measurement")
    parser.add_argument("--quick", action="store_true", help="one short round, of little: a test")
    parser.add_argument("--check", action="store_true", help="fail unless each row has a figure")
    parser.add_argument("--json", metavar="FILE", help="all that was measured")
    parser.add_argument("--svg", metavar="FILE", help="a plot of it")
    parser.add_argument("--etcd", default=os.environ.get("COORDINATION_ETCD") or "etcd")
    parser.add_argument("--worker", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--build", required=True, help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.only) - {row.name for row in WORKS}
    if unknown:
        parser.error("no such row: " + ", ".join(sorted(unknown)))
    if options.quick:
        options.rounds, options.seconds = 1, 0.03
    options.etcd = shutil.which(options.etcd)
    return options


def build_go(folder):
    """The path of the program in Go, or why there is none."""
    if not shutil.which("go"):
        return None, "there is no go on this machine"
    program = os.path.join(os.path.abspath(folder), "bench_go")
    done = subprocess.run(["go", "build", "-p", "1", "-o", program, "."], check=False, text=True,
                          cwd=os.path.join(HERE, "go"), capture_output=True)
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["go build failed"])[-1]
    return program, None


def check(bench, lines):
    """What has no figure though it should have one."""
    missing = list(bench.failures)
    for line in lines:
        for contender in line["expected"]:
            counted = line["figure"] != "allocations" or contender != "go"
            if contender == "go" and not bench.options.go:
                continue
            if counted and not line["rounds"].get(contender):
                missing.append(f"{line['text']}: no figure of {NAMES[contender]}")
    return missing


def report(bench, rows, header):
    lines, demands = list(lines_of(bench, rows)), list(judged(bench))
    print(", ".join(f"{name}: {value}" for name, value in header.items()) + "\n")
    print("\n".join(table(lines)) + "\n")
    print("\n".join(demands_table(demands)))
    if bench.options.json:
        with open(bench.options.json, "w", encoding="utf-8") as file:
            json.dump({"facts": header, "rows": lines, "demands": demands}, file, indent=1,
                      ensure_ascii=False)
    if bench.options.svg:
        import plot
        with open(bench.options.svg, "w", encoding="utf-8") as file:
            file.write(plot.draw(header, lines))
    return check(bench, lines)


def main():
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = parse()
    if not options.etcd:
        print("SKIPPED: there is no etcd")
        sys.exit(77)
    options.go, why = build_go(options.build)
    if why:
        print(f"Go: SKIPPED: {why}")
    header = facts(options)
    if options.quick:
        print("--quick: these figures tell nothing but that there are some")
    if os.getloadavg()[0] > 0.5:
        print(f"WARNING: this machine is not idle: load {os.getloadavg()[0]:.1f}; only ratios of "
              "one run count, and not even those when the load changes", file=sys.stderr)
    rows = [row for row in WORKS if not options.only or row.name in options.only]
    bench = Bench(options)
    try:
        bench.run(rows)
        missing = report(bench, rows, header)
    finally:
        bench.close()
    for line in missing:
        print("MISSING:", line)
    sys.exit(1 if missing and options.check else 0)


if __name__ == "__main__":
    main()
