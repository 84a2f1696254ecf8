// interop: etcd's own Go client, and its concurrency package, beside the library.
//
//	interop ENDPOINT lock PREFIX TTL        says "held KEY REVISION"; SIGTERM gives it back
//	interop ENDPOINT elect PREFIX VALUE TTL the same of an office
//	interop ENDPOINT pass PREFIX TTL N      N times: says "held REVISION", and gives it back
//	interop ENDPOINT register PREFIX ID     writes a record as the Go module does
//	interop ENDPOINT discover PREFIX        says what it reads of each
//	interop ENDPOINT put KEY VALUE, get KEY
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// ServiceInfo is the record of the Go module, with its tags: ttl is in nanoseconds.
type ServiceInfo struct {
	ID       string            `json:"id"`
	Name     string            `json:"name"`
	Address  string            `json:"address"`
	Port     int               `json:"port"`
	Metadata map[string]string `json:"metadata"`
	TTL      time.Duration     `json:"ttl"`
}

var (
	ctx    = context.Background()
	client *clientv3.Client
	told   = make(chan os.Signal, 1) // SIGTERM
)

func must(err error) {
	if err != nil {
		fmt.Println("failed:", err)
		os.Exit(1)
	}
}

func number(text string) int {
	n, err := strconv.Atoi(text)
	must(err)
	return n
}

func session(ttl string) *concurrency.Session {
	made, err := concurrency.NewSession(client, concurrency.WithTTL(number(ttl)))
	must(err)
	return made
}

// untilTold waits for SIGTERM, or says that the lease is lost.
func untilTold(s *concurrency.Session) {
	select {
	case <-told:
	case <-s.Done():
		fmt.Println("lost")
		<-told
	}
}

func lock(prefix, ttl string) {
	s := session(ttl)
	mutex := concurrency.NewMutex(s, prefix)
	must(mutex.Lock(ctx))
	fmt.Println("held", mutex.Key(), revision(mutex.Key()))
	untilTold(s)
	must(mutex.Unlock(ctx))
	fmt.Println("released")
}

// revision is the create revision of a key.
func revision(key string) int64 {
	answer, err := client.Get(ctx, key)
	must(err)
	if len(answer.Kvs) == 0 {
		return 0
	}
	return answer.Kvs[0].CreateRevision
}

func elect(prefix, value, ttl string) {
	s := session(ttl)
	election := concurrency.NewElection(s, prefix)
	must(election.Campaign(ctx, value))
	fmt.Println("held", election.Key(), election.Rev())
	untilTold(s)
	must(election.Resign(ctx))
	fmt.Println("released")
}

func pass(prefix, ttl string, times int) {
	s := session(ttl)
	mutex := concurrency.NewMutex(s, prefix)
	fmt.Println("begins")
	for i := 0; i < times; i++ {
		must(mutex.Lock(ctx))
		fmt.Println("held", revision(mutex.Key()))
		raise("/counter")
		must(mutex.Unlock(ctx))
	}
	must(s.Close())
}

// raise adds one to a counter, as who is alone can do it.
func raise(key string) {
	answer, err := client.Get(ctx, key)
	must(err)
	before := 0
	if len(answer.Kvs) > 0 {
		before = number(string(answer.Kvs[0].Value))
	}
	_, err = client.Put(ctx, key, strconv.Itoa(before+1))
	must(err)
}

func register(prefix, id string) {
	record, err := json.Marshal(ServiceInfo{ID: id, Name: "svc", Address: "10.0.0.7", Port: 8080,
		Metadata: map[string]string{"zone": "b", "größe": "<x>"}, TTL: 2500 * time.Millisecond})
	must(err)
	_, err = client.Put(ctx, prefix+id, string(record))
	must(err)
}

func discover(prefix string) {
	answer, err := client.Get(ctx, prefix, clientv3.WithPrefix())
	must(err)
	for _, kv := range answer.Kvs {
		var service ServiceInfo
		must(json.Unmarshal(kv.Value, &service))
		fmt.Println(service.ID, service.Name, service.Address, service.Port, service.Metadata,
			service.TTL)
	}
}

func main() {
	signal.Notify(told, syscall.SIGTERM) // before anything is said: the answer may come at once
	var err error
	client, err = clientv3.New(clientv3.Config{Endpoints: []string{os.Args[1]}, DialTimeout: 10 * time.Second})
	must(err)
	defer client.Close()
	switch args := os.Args[3:]; os.Args[2] {
	case "lock":
		lock(args[0], args[1])
	case "elect":
		elect(args[0], args[1], args[2])
	case "pass":
		pass(args[0], args[1], number(args[2]))
	case "register":
		register(args[0], args[1])
	case "discover":
		discover(args[0])
	case "put":
		_, err = client.Put(ctx, args[0], args[1])
		must(err)
	case "get":
		answer, err := client.Get(ctx, args[0])
		must(err)
		for _, kv := range answer.Kvs {
			fmt.Println(string(kv.Value))
		}
	}
}
