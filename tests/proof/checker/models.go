package main

import (
	"fmt"
	"math"
	"sort"
	"time"

	"github.com/anishathalye/porcupine"
)

// call is one line of the soak's operations.jsonl.
type call struct {
	Process int    `json:"process"`
	Kind    string `json:"kind"`
	Is      string `json:"is"`
	Code    string `json:"code"`
	Begin   int64  `json:"begin"`
	End     int64  `json:"end"`
	In      struct {
		Key    string            `json:"key"`
		Queue  string            `json:"queue"`
		Mode   string            `json:"mode"`
		Token  int64             `json:"token"`
		Writes map[string]string `json:"writes"`
		Expect *string           `json:"expect"` // of cas: the value that was read; null: none
	} `json:"in"`
	Out struct {
		Value string `json:"value"`
		Token int64  `json:"token"`
		Held  bool   `json:"held"`
	} `json:"out"`
}

// operation is what a model is asked about. Values are unique, so a value stands for its revision.
type operation struct {
	does   string // get set cas differs remove; acquire held release lose
	value  string // what is read or written, or who holds
	expect string
	maybe  bool // it may have happened, between its begin and for ever
}

// A state is a value or a holder; none, or nobody; or what nobody knows: then everything fits.
const (
	none    = ""
	unknown = "?"
)

func fits(state, wanted string) bool { return state == unknown || state == wanted }

// step gives the states to which an operation can lead; none if it cannot happen.
func step(state string, op operation) []string {
	var after []string
	switch op.does {
	case "set":
		after = []string{op.value}
	case "get", "held":
		if fits(state, op.value) {
			after = []string{op.value}
		}
	case "acquire":
		if fits(state, none) {
			after = []string{op.value}
		}
	case "cas":
		if fits(state, op.expect) {
			after = []string{op.value}
		}
	case "differs": // a cas that was refused
		if state == unknown || state != op.expect {
			after = []string{state}
		}
	case "remove":
		if state != none {
			after = []string{none}
		}
	case "release":
		if fits(state, op.value) {
			after = []string{none}
		}
	}
	if op.maybe && (len(after) == 0 || after[0] != state) {
		after = append(after, state)
	}
	return after
}

func model(initial string) porcupine.Model {
	nondeterministic := porcupine.NondeterministicModel{
		Init: func() []interface{} { return []interface{}{initial} },
		Step: func(state, input, output interface{}) []interface{} {
			var after []interface{}
			for _, s := range step(state.(string), input.(operation)) {
				after = append(after, s)
			}
			return after
		},
		Equal: func(a, b interface{}) bool { return a == b },
	}
	return nondeterministic.ToModel()
}

// history is what has been done to one key or queue, in the order of the begins.
type history []porcupine.Operation

// legal is porcupine.Ok, Illegal or Unknown.
func legal(h history, initial string, limit seconds) porcupine.CheckResult {
	return porcupine.CheckOperationsTimeout(model(initial), h, limit.duration())
}

// window is the smallest part of an illegal history that is illegal by itself: from the first call
// on whose end nothing before it is needed for, up to the first end by which it is.
func window(h history, limit seconds) history {
	bad := func(from, to int64) bool {
		initial := none
		if from > math.MinInt64 {
			initial = unknown
		}
		return legal(part(h, from, to), initial, limit) == porcupine.Illegal
	}
	ends := times(h, func(o porcupine.Operation) int64 { return o.Return })
	last := sort.Search(len(ends)-1, func(i int) bool { return bad(math.MinInt64, ends[i]) })
	begins := times(h, func(o porcupine.Operation) int64 { return o.Call })
	first := sort.Search(len(begins), func(i int) bool { return !bad(begins[i], ends[last]) })
	if first == 0 {
		return reduced(part(h, math.MinInt64, ends[last]), none, limit)
	}
	return reduced(part(h, begins[first-1], ends[last]), unknown, limit)
}

// reduced leaves out what the history is as illegal without, for a while: reads, and all that one
// holder has done. (What is legal stays so without them.)
func reduced(h history, initial string, limit seconds) history {
	end := time.Now().Add(6 * limit.duration())
	for _, group := range groups(h) {
		var rest history
		for _, o := range h {
			if group != groupOf(o) {
				rest = append(rest, o)
			}
		}
		if time.Now().After(end) {
			break
		}
		if legal(rest, initial, limit) == porcupine.Illegal {
			h = rest
		}
	}
	return h
}

func groupOf(o porcupine.Operation) string {
	switch op := o.Input.(operation); op.does {
	case "acquire", "held", "release":
		return op.value
	case "get", "differs":
		return fmt.Sprint(o.Call, o.Return)
	}
	return "" // a write is needed
}

func groups(h history) []string {
	var all []string
	seen := map[string]bool{"": true}
	for _, o := range h {
		if g := groupOf(o); !seen[g] {
			seen[g] = true
			all = append(all, g)
		}
	}
	return all
}

func times(h history, of func(porcupine.Operation) int64) []int64 {
	var all []int64
	for _, o := range h {
		all = append(all, of(o))
	}
	sort.Slice(all, func(i, k int) bool { return all[i] < all[k] })
	return all
}

// part has the calls that ended after `from` and began before `to`. What is cut off at either end
// may or may not belong to it.
func part(h history, from, to int64) history {
	var some history
	for _, o := range h {
		if o.Return < from || o.Call > to {
			continue
		}
		if o.Call < from || o.Return > to {
			op := o.Input.(operation)
			op.maybe = true
			o.Input = op
		}
		if o.Return > to {
			o.Return = math.MaxInt64
		}
		some = append(some, o)
	}
	return some
}
