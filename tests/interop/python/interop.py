"""interop: etcd3gw, a client of the JSON gateway as the library is, beside it.

    interop.py ENDPOINT lock PREFIX TTL         says "held KEY REVISION"; SIGTERM gives it back
    interop.py ENDPOINT elect PREFIX VALUE TTL  the same of an office
    interop.py ENDPOINT put KEY VALUE, get KEY

Its own lock is one key and no queue. Here is the queue of Go's concurrency package, made of its
leases, transactions and ranges.
"""
import signal
import sys
import threading
import time

import etcd3gw

told = threading.Event()


def keep_alive(lease, ttl):
    while not told.wait(ttl / 3):
        lease.refresh()


def stand_in_queue(client, prefix, value, ttl):
    lease = client.lease(ttl)
    threading.Thread(target=keep_alive, args=(lease, ttl), daemon=True).start()
    key = f"{prefix}/{lease.id:x}"
    client.create(key, value, lease)
    mine = int(client.get(key, metadata=True)[0][1]["create_revision"])
    while True:
        first = client.get_prefix(prefix + "/", sort_order="ascend", sort_target="create")[0][1]
        if int(first["create_revision"]) == mine:
            break
        time.sleep(0.05)
    print("held", key, mine, flush=True)
    told.wait()
    client.delete(key)
    print("released", flush=True)


def main():
    host, port = sys.argv[1].rsplit(":", 1)
    client = etcd3gw.client(host=host, port=int(port), timeout=10)
    what, *args = sys.argv[2:]
    signal.signal(signal.SIGTERM, lambda number, frame: told.set())
    if what == "lock":
        stand_in_queue(client, args[0], "", int(args[1]))
    elif what == "elect":
        stand_in_queue(client, args[0], args[1], int(args[2]))
    elif what == "put":
        client.put(args[0], args[1].encode())  # of a str it takes Latin-1
    elif what == "get":
        for value in client.get(args[0]):
            print(value.decode())


main()
