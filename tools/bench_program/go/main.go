// bench: etcd's own Go client, and its concurrency package, at the same works as bench_worker.
//
//	bench WORK URL SECONDS N [CA]
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

const ttl = 60 // of a lock, in seconds

var (
	ctx        = context.Background()
	url        string
	duration   time.Duration
	n          int
	tlsConfig  *tls.Config
	handshakes atomic.Int64
	value      = strings.Repeat("v", 32)
)

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "go:", err)
		os.Exit(1)
	}
}

func say(name string, value float64) { fmt.Printf("%s %.6g\n", name, value) }

func sayTimes(times []time.Duration) {
	sort.Slice(times, func(i, k int) bool { return times[i] < times[k] })
	at := func(p float64) float64 { return times[int(p*float64(len(times)))].Seconds() * 1e6 }
	say("p50", at(0.5))
	say("p99", at(0.99))
}

func cpu() time.Duration {
	var usage syscall.Rusage
	must(syscall.Getrusage(syscall.RUSAGE_SELF, &usage))
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

func status(name string) float64 {
	file, err := os.Open("/proc/self/status")
	must(err)
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if fields := strings.Fields(lines.Text()); fields[0] == name+":" {
			number, err := strconv.ParseFloat(fields[1], 64)
			must(err)
			return number
		}
	}
	return 0
}

func connect() *clientv3.Client {
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{url}, TLS: tlsConfig,
		DialTimeout: 10 * time.Second})
	must(err)
	return client
}

func put(client *clientv3.Client, key string) {
	_, err := client.Put(ctx, key, value)
	must(err)
}

// A mutex on a session of its own.
func mutex(client *clientv3.Client) *concurrency.Mutex {
	session, err := concurrency.NewSession(client, concurrency.WithTTL(ttl))
	must(err)
	return concurrency.NewMutex(session, fmt.Sprint("bench-lock-", os.Getpid()))
}

// calls makes as many calls as can be made by n goroutines that share a client.
func calls(call func(i int)) {
	for i := 0; i < n; i++ {
		for k := 0; k < 5; k++ {
			call(i)
		}
	}
	times := make([][]time.Duration, n)
	handshakesBefore, used, start := handshakes.Load(), cpu(), time.Now()
	var all sync.WaitGroup
	for i := 0; i < n; i++ {
		all.Add(1)
		go func() {
			defer all.Done()
			for len(times[i]) == 0 || time.Since(start) < duration {
				begin := time.Now()
				call(i)
				times[i] = append(times[i], time.Since(begin))
			}
		}()
	}
	all.Wait()
	took := time.Since(start).Seconds()
	used = cpu() - used
	joined := []time.Duration{}
	for _, some := range times {
		joined = append(joined, some...)
	}
	count := float64(len(joined))
	say("rate", count/took)
	say("cpu", used.Seconds()*1e6/count)
	say("handshakes", float64(handshakes.Load()-handshakesBefore)/count)
	sayTimes(joined)
}

func keyOf(i int) string { return "bench/" + strconv.Itoa(i) }

func doGet() {
	client := connect()
	for i := 0; i < n; i++ {
		put(client, keyOf(i))
	}
	calls(func(i int) {
		_, err := client.Get(ctx, keyOf(i))
		must(err)
	})
}

func doPut() {
	client := connect()
	calls(func(i int) { put(client, keyOf(i)) })
}

func doLock() {
	m := mutex(connect())
	calls(func(int) {
		must(m.Lock(ctx))
		must(m.Unlock(ctx))
	})
}

func doConnect() {
	calls(func(int) {
		client := connect()
		put(client, keyOf(1))
		must(client.Close())
	})
}

func doHandover() {
	var handovers, acquired atomic.Int64
	var last atomic.Int64
	last.Store(-1)
	for i := 0; i < n; i++ {
		m := mutex(connect())
		go func() {
			for {
				must(m.Lock(ctx))
				acquired.Add(1)
				if last.Swap(int64(i)) != int64(i) {
					handovers.Add(1)
				}
				must(m.Unlock(ctx))
			}
		}()
	}
	time.Sleep(duration / 4) // all of them are there
	handoversBefore, acquiredBefore := handovers.Load(), acquired.Load()
	handshakesBefore, start := handshakes.Load(), time.Now()
	for acquired.Load() < acquiredBefore+3 {
		time.Sleep(duration)
	}
	say("rate", float64(handovers.Load()-handoversBefore)/time.Since(start).Seconds())
	say("handshakes", float64(handshakes.Load()-handshakesBefore)/
		float64(acquired.Load()-acquiredBefore))
}

func doWaiter() {
	holder, waiting := mutex(connect()), mutex(connect())
	times := []time.Duration{}
	for begin := time.Now(); len(times) < 3 || time.Since(begin) < duration; {
		must(holder.Lock(ctx))
		got := make(chan time.Time)
		go func() {
			must(waiting.Lock(ctx))
			now := time.Now()
			must(waiting.Unlock(ctx))
			got <- now
		}()
		time.Sleep(time.Duration(n) * time.Millisecond)
		start := time.Now()
		must(holder.Unlock(ctx))
		times = append(times, (<-got).Sub(start))
	}
	sayTimes(times)
}

func doEvent() {
	writer, watcher := connect(), connect()
	put(writer, keyOf(0))
	arrivals := make(chan time.Time, 16)
	watch := watcher.Watch(ctx, keyOf(0))
	go func() {
		for answer := range watch {
			must(answer.Err())
			arrivals <- time.Now()
		}
	}()
	for i := 1; i < n; i++ {
		watcher.Watch(ctx, "other/"+strconv.Itoa(i))
	}
	time.Sleep(min(duration, 1500*time.Millisecond))
	times := []time.Duration{}
	for begin := time.Now(); len(times) == 0 || time.Since(begin) < duration; {
		start := time.Now()
		put(writer, keyOf(0))
		times = append(times, (<-arrivals).Sub(start))
		time.Sleep(time.Millisecond)
	}
	sayTimes(times)
}

func doWatches() {
	const mostOps = 128
	client := connect()
	put(client, keyOf(0))
	before, start := status("VmRSS"), time.Now()
	channels := make([]clientv3.WatchChan, n)
	puts := make([]clientv3.Op, n)
	for i := range channels {
		key := "many/" + strconv.Itoa(i)
		channels[i] = client.Watch(ctx, key)
		puts[i] = clientv3.OpPut(key, value)
	}
	for begin := 0; begin < n; begin += mostOps {
		_, err := client.Txn(ctx).Then(puts[begin:min(n, begin+mostOps)]...).Commit()
		must(err)
	}
	for _, channel := range channels {
		answer := <-channel
		must(answer.Err())
	}
	say("seconds", time.Since(start).Seconds())
	say("mb", (status("VmRSS")-before)/1024)
	say("threads", status("Threads"))
}

func doLeases() {
	const parallel = 16
	client := connect()
	seconds := max(3, int64(3*duration.Seconds()))
	var all sync.WaitGroup
	for t := 0; t < parallel; t++ {
		all.Add(1)
		go func() {
			defer all.Done()
			for i := t; i < n; i += parallel {
				lease, err := client.Grant(ctx, seconds)
				must(err)
				alive, err := client.KeepAlive(ctx, lease.ID)
				must(err)
				go func() {
					for range alive {
					}
				}()
			}
		}()
	}
	all.Wait()
	used, start := cpu(), time.Now()
	time.Sleep(duration)
	say("cpu", (cpu()-used).Seconds()*1e3/time.Since(start).Seconds())
	say("threads", status("Threads"))
}

func main() {
	works := map[string]func(){"get": doGet, "put": doPut, "lock": doLock, "connect": doConnect,
		"handover": doHandover, "waiter": doWaiter, "event": doEvent, "watches": doWatches,
		"leases": doLeases}
	if len(os.Args) < 5 || works[os.Args[1]] == nil {
		fmt.Println("bench WORK URL SECONDS N [CA]")
		os.Exit(2)
	}
	url = os.Args[2]
	seconds, err := strconv.ParseFloat(os.Args[3], 64)
	must(err)
	duration = time.Duration(seconds * float64(time.Second))
	n, err = strconv.Atoi(os.Args[4])
	must(err)
	if len(os.Args) > 5 {
		pem, err := os.ReadFile(os.Args[5])
		must(err)
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(pem)
		tlsConfig = &tls.Config{RootCAs: pool, VerifyConnection: func(tls.ConnectionState) error {
			handshakes.Add(1)
			return nil
		}}
	}
	works[os.Args[1]]()
}
