// checker judges the operations.jsonl of a soak by Porcupine: registers (set, get, compare_and_set,
// remove) and the ownership of locks, each key and queue by itself. Its exit status: 0, 1 if one is
// not linearizable, 2 if one could not be decided in time.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"os"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

type seconds int

func (s seconds) duration() time.Duration { return time.Duration(s) * time.Second }

// owners collects what each holder of a queue has said, until it can be said what became of it.
type owners map[string]*owner
type owner struct {
	name     string // the token
	acquired int64  // not before this
	released bool
	notes    history
}

type histories struct {
	registers map[string]history
	queues    map[string]owners
}

func read(path string) (histories, error) {
	all := histories{map[string]history{}, map[string]owners{}}
	file, err := os.Open(path)
	if err != nil {
		return all, err
	}
	defer file.Close()
	decoder := json.NewDecoder(bufio.NewReader(file))
	for decoder.More() {
		var c call
		if err := decoder.Decode(&c); err != nil {
			return all, err
		}
		all.add(c)
	}
	return all, nil
}

func (all *histories) add(c call) {
	if c.In.Queue == "" {
		if op, counts := registerOperation(c); counts {
			all.registers[c.In.Key] = append(all.registers[c.In.Key], timed(c, op))
		}
	} else if c.In.Mode == "exclusive" || c.In.Mode == "office" {
		if all.queues[c.In.Queue] == nil {
			all.queues[c.In.Queue] = owners{}
		}
		all.queues[c.In.Queue].add(c)
	}
}

func timed(c call, op operation) porcupine.Operation {
	end := c.End
	if op.maybe {
		end = math.MaxInt64
	}
	return porcupine.Operation{ClientId: c.Process, Input: op, Call: c.Begin, Return: end}
}

// registerOperation: a call that failed without effect tells nothing, but for what it has found.
func registerOperation(c call) (operation, bool) {
	op := operation{does: c.Kind, maybe: c.Is == "maybe"}
	if c.Kind == "get" {
		op.maybe = false
		op.value = c.Out.Value
		return op, c.Is == "done" || c.Code == "NOT_FOUND"
	}
	op.value = c.In.Writes[c.In.Key]
	if c.In.Expect != nil {
		op.expect = *c.In.Expect
	}
	if c.Is == "not" && c.Kind == "cas" {
		op.does = "differs"
		return op, c.Code == "CONFLICT"
	}
	if c.Is == "not" && c.Kind == "remove" {
		op.does = "get"
		return op, c.Code == "NOT_FOUND"
	}
	return op, c.Is != "not"
}

// add: a release that was done is one, and of a lock that was lost it was before that was told.
// After any other nobody knows when it went, if at all.
func (all owners) add(c call) {
	token := c.In.Token
	if c.Kind == "acquire" {
		token = c.Out.Token
		if c.Is != "done" {
			return
		}
	}
	name := strconv.FormatInt(token, 10)
	if all[name] == nil {
		all[name] = &owner{name: name}
	}
	o := all[name]
	switch {
	case c.Kind == "acquire":
		o.acquired = c.Begin // it may have been lost before the answer came
		o.notes = append(o.notes, timed(c, operation{does: "acquire", value: name}))
	case c.Kind == "release" && c.Is == "done":
		o.released = true
		o.notes = append(o.notes, timed(c, operation{does: "release", value: name}))
	case c.Kind == "release" && c.Code == "LOST": // at some time before
		o.released = true
		c.Begin = o.acquired
		o.notes = append(o.notes, timed(c, operation{does: "release", value: name}))
	case c.Kind == "held" && c.Is == "done" && c.Out.Held && !strings.HasPrefix(c.In.Queue, robbed):
		o.notes = append(o.notes, timed(c, operation{does: "held", value: name}))
	}
}

// Of these the soak deletes keys, and held() is local: it may be told of it later.
const robbed = "/soak/locks/robbed"

func (all owners) history() history {
	var h history
	for _, o := range all {
		h = append(h, o.notes...)
		if !o.released {
			op := operation{does: "release", value: o.name, maybe: true}
			h = append(h, porcupine.Operation{Input: op, Call: o.acquired, Return: math.MaxInt64})
		}
	}
	sort.SliceStable(h, func(i, k int) bool { return h[i].Call < h[k].Call })
	return h
}

type verdict struct {
	bad, undecided, operations int
}

func (v *verdict) judge(name string, h history, limit seconds) {
	v.operations += len(h)
	switch legal(h, none, limit) {
	case porcupine.Illegal:
		v.bad++
		if v.bad <= 3 {
			print(name, window(h, 5))
		}
	case porcupine.Unknown:
		v.undecided++
		fmt.Printf("undecided after %d s: %s, %d operations\n", limit, name, len(h))
	}
}

func print(name string, h history) {
	fmt.Printf("NOT LINEARIZABLE: %s; the smallest window:\n", name)
	for _, o := range h {
		op := o.Input.(operation)
		end := strconv.FormatInt(o.Return, 10)
		if o.Return == math.MaxInt64 {
			end = "?"
		}
		fmt.Printf("    process %d, %d to %s: %s %s", o.ClientId, o.Call, end, op.does, op.value)
		if op.does == "cas" || op.does == "differs" {
			fmt.Printf(" (expected %q)", op.expect)
		}
		if op.maybe {
			fmt.Print(" (maybe)")
		}
		fmt.Println()
	}
}

func main() {
	limit := flag.Int("limit", 120, "seconds for each key")
	flag.Parse()
	all, err := read(flag.Arg(0))
	if err != nil {
		fmt.Println(err)
		os.Exit(3)
	}
	var registers, locks verdict
	for key, h := range all.registers {
		registers.judge(key, h, seconds(*limit))
	}
	for queue, o := range all.queues {
		locks.judge(queue, o.history(), seconds(*limit))
	}
	say := func(what string, v verdict, n int) {
		fmt.Printf("%s: %d operations on %d keys: %d not linearizable, %d undecided\n", what,
			v.operations, n, v.bad, v.undecided)
	}
	say("registers", registers, len(all.registers))
	say("ownership", locks, len(all.queues))
	if registers.bad+locks.bad > 0 {
		os.Exit(1)
	}
	if registers.undecided+locks.undecided > 0 {
		os.Exit(2)
	}
}
