#!/usr/bin/env python3
"""A soak that finds nothing proves nothing: each of these faults, planted into a copy of the
header, must be found by it within five minutes; and nothing in the header as it is.

    tests/proof/mutants.py [--etcd PATH] [--seed N] [NAME...]
    tests/proof/mutants.py --check    looks only whether all of them can still be planted

Builds below build/mutants. Exit status: how many were not found, or were found in what is whole.
"""
import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

root = Path(__file__).resolve().parents[2]

WHOLE = "the header as it is"

# What is to be replaced stands in the header once.
MUTANTS = {
    WHOLE: [],
    "unlock without the guard": [
        ("    txn.when(ours).then(Op::remove(key));\n    bool repeated",
         "    txn.then(Op::remove(key));\n    bool repeated"),
    ],
    "retry of a MaybeApplied write": [
        ("    if (unknown && call.safety == Safety::Write) return false;\n", ""),
    ],
    "watch resumed one revision late": [
        ("if (returns && watch->anchored && start > 1) --start;",
         "if (returns && watch->anchored && start > 1) ++start;"),
    ],
    "held() from the receive instant": [
        ("    answered(it->second, sent, reply->ttl);",
         "    answered(it->second, (std::max)(sent, client.clock->now()), reply->ttl);"),
    ],
    "semaphores one permit too many": [
        ("{detail::QueueRule::Kind::Permits, permits_}, false",
         "{detail::QueueRule::Kind::Permits, permits_ + 1}, false"),
        ("{detail::QueueRule::Kind::Permits, permits_}, true",
         "{detail::QueueRule::Kind::Permits, permits_ + 1}, true"),
    ],
}


def mutated(name):
    header = (root / "coordination.hpp").read_text(encoding="utf-8")
    for old, new in MUTANTS[name]:
        if header.count(old) != 1:
            sys.exit(f"{name}: stands in the header {header.count(old)} times: {old.strip()}")
        header = header.replace(old, new)
    return header


def plant(name, folder):
    """A copy of what is needed to build, with the fault in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for part in ("CMakeLists.txt", "CMakePresets.json"):
        shutil.copy(root / part, folder)
    for part in ("tests", "tools", "examples"):
        shutil.copytree(root / part, folder / part)
    (folder / "coordination.hpp").write_text(mutated(name), encoding="utf-8")


def is_judged_well(name, options):
    folder = root / "build/mutants" / name.replace(" ", "_").replace("()", "")
    plant(name, folder)
    environment = dict(os.environ, COORDINATION_BUILD_DIR=str(folder / "build"))
    soak = [str(folder / "tools/soak"), "--seed", str(options.seed)]
    if options.etcd:
        soak += ["--etcd", options.etcd]
    subprocess.run(soak + ["--help"], env=environment, check=True, stdout=subprocess.DEVNULL)
    begin = time.monotonic()
    run = subprocess.run(soak + ["--time", options.time], env=environment, stdout=subprocess.PIPE,
                         text=True, check=False)
    took = time.monotonic() - begin
    (folder / "soak.txt").write_text(run.stdout, encoding="utf-8")
    broken = [line for line in run.stdout.splitlines()
              if "VIOLATED," in line or line.startswith("NOT LINEARIZABLE")]
    found = run.returncode == 1 and bool(broken) and took < 300
    verdict = "found" if found else "NOT FOUND"
    if name == WHOLE:
        verdict = "VIOLATED" if run.returncode else "holds"
    print(f"{name}: {verdict} in {took:.0f} s, seed {options.seed}")
    for line in broken:
        print("    " + line)
    sys.stdout.flush()
    return run.returncode == 0 if name == WHOLE else found


parser = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--etcd")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--time", default="150s")
parser.add_argument("--check", action="store_true")
parser.add_argument("names", nargs="*", metavar="NAME", help="one of: " + "; ".join(MUTANTS))
arguments = parser.parse_args()
for unknown in set(arguments.names) - set(MUTANTS):
    parser.error(f"there is no '{unknown}'")
if arguments.check:
    sys.exit(0 if all(map(mutated, MUTANTS)) else 1)
sys.exit(sum(not is_judged_well(name, arguments) for name in arguments.names or MUTANTS))
