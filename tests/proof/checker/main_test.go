package main

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Lines of operations.jsonl.

func line(kind string, begin, end int64, in, out, is, code string) string {
	return fmt.Sprintf(`{"process":1,"kind":%q,"begin":%d,"end":%d,"in":{%s},"out":{%s},"is":%q,"code":%q}`,
		kind, begin, end, in, out, is, code)
}
func key(rest string) string { return `"key":"k"` + rest }
func set(begin, end int64, value, is string) string {
	return line("set", begin, end, key(`,"writes":{"k":"`+value+`"}`), "", is, "")
}
func get(begin, end int64, value string) string {
	return line("get", begin, end, key(""), `"value":"`+value+`"`, "done", "")
}
func absent(begin, end int64) string { return line("get", begin, end, key(""), "", "not", "NOT_FOUND") }
func cas(begin, end int64, expect, value, is, code string) string {
	in := key(`,"expect":` + expect + `,"writes":{"k":"` + value + `"}`)
	return line("cas", begin, end, in, "", is, code)
}
func remove(begin, end int64, is, code string) string {
	return line("remove", begin, end, key(""), "", is, code)
}

const queue = `"queue":"q","mode":"exclusive"`

func acquire(begin, end int64, token int) string {
	return line("acquire", begin, end, queue, fmt.Sprintf(`"token":%d`, token), "done", "")
}
func of(kind string, begin, end int64, token int, is string) string {
	in := fmt.Sprintf(`%s,"token":%d`, queue, token)
	return line(kind, begin, end, in, `"held":true`, is, "")
}

func lost(begin, end int64, token int) string {
	return line("release", begin, end, fmt.Sprintf(`%s,"token":%d`, queue, token), "", "not", "LOST")
}

func load(t *testing.T, lines []string) histories {
	t.Helper()
	path := filepath.Join(t.TempDir(), "operations.jsonl")
	if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	all, err := read(path)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func bad(t *testing.T, lines []string) int {
	all := load(t, lines)
	var v verdict
	for name, h := range all.registers {
		v.judge(name, h, 10)
	}
	for name, o := range all.queues {
		v.judge(name, o.history(), 10)
	}
	if v.undecided > 0 {
		t.Error("undecided")
	}
	return v.bad
}

func TestHistories(t *testing.T) {
	for _, c := range []struct {
		name  string
		bad   int
		lines []string
	}{
		{"in turn", 0, []string{absent(0, 1), set(2, 3, "a", "done"), get(4, 5, "a"),
			cas(6, 7, `"a"`, "b", "done", ""), remove(8, 9, "done", ""), absent(10, 11),
			cas(12, 13, "null", "c", "done", ""), get(14, 15, "c")}},
		{"at once", 0, []string{set(0, 9, "a", "done"), set(1, 8, "b", "done"), get(2, 3, "a"),
			get(4, 5, "b")}},
		{"maybe: never", 0, []string{set(0, 1, "a", "maybe"), absent(2, 3), absent(8, 9)}},
		{"maybe: later", 0, []string{set(0, 1, "a", "maybe"), absent(2, 3), get(4, 5, "a")}},
		{"not applied", 0, []string{set(0, 1, "a", "not"), absent(2, 3)}},
		{"refused", 0, []string{set(0, 1, "a", "done"), cas(2, 3, "null", "b", "not", "CONFLICT"),
			get(4, 5, "a")}},
		{"an old value", 1, []string{set(0, 1, "a", "done"), set(2, 3, "b", "done"), get(4, 5, "a")}},
		{"a lost write", 1, []string{set(0, 1, "a", "done"), absent(2, 3)}},
		{"applied all the same", 1, []string{set(0, 1, "a", "not"), get(2, 3, "a")}},
		{"applied twice", 1, []string{set(0, 1, "a", "maybe"), get(2, 3, "a"),
			set(4, 5, "b", "done"), get(6, 7, "a")}},
		{"over a change", 1, []string{set(0, 1, "a", "done"), set(2, 3, "b", "done"),
			cas(4, 5, `"a"`, "c", "done", "")}},
		{"refused without a reason", 1, []string{set(0, 1, "a", "done"),
			cas(2, 3, `"a"`, "b", "not", "CONFLICT")}},
		{"removed twice", 1, []string{set(0, 1, "a", "done"), remove(2, 3, "done", ""),
			remove(4, 5, "done", "")}},
		{"not there to be removed", 1, []string{set(0, 1, "a", "done"),
			remove(2, 3, "not", "NOT_FOUND")}},

		{"in turn", 0, []string{acquire(0, 1, 1), of("held", 2, 3, 1, "done"),
			of("release", 4, 5, 1, "done"), acquire(0, 6, 2), of("release", 7, 8, 2, "done")}},
		{"lost", 0, []string{acquire(0, 1, 1), acquire(0, 6, 2), of("release", 7, 8, 1, "not")}},
		{"lost, and told", 0, []string{acquire(0, 1, 1), acquire(0, 6, 2), lost(7, 8, 1)}},
		{"told of its loss, and then held", 1, []string{acquire(0, 1, 1), lost(2, 3, 1),
			of("held", 4, 5, 1, "done")}},
		{"lost before its answer", 0, []string{acquire(0, 9, 1), acquire(0, 6, 2)}},
		{"killed", 0, []string{acquire(0, 1, 1), acquire(2, 6, 2)}},
		{"two owners", 1, []string{acquire(0, 1, 1), acquire(2, 3, 2), of("release", 4, 5, 1, "done")}},
		{"held by two", 1, []string{acquire(0, 1, 1), acquire(2, 3, 2), of("held", 4, 5, 1, "done")}},
	} {
		if got := bad(t, c.lines); got != c.bad {
			t.Errorf("%s: %d violations, not %d", c.name, got, c.bad)
		}
	}
}

func TestWindowIsSmall(t *testing.T) {
	var lines []string
	for i := int64(0); i < 100; i++ {
		lines = append(lines, set(10*i, 10*i+1, fmt.Sprint(i), "done"),
			get(10*i+2, 10*i+3, fmt.Sprint(i)))
	}
	lines = append(lines[:120], append([]string{get(596, 597, "12")}, lines[120:]...)...)
	h := load(t, lines).registers["k"]
	w := window(h, 10)
	if len(w) != 2 { // what was read before, and this
		t.Errorf("%d operations", len(w))
		print("k", w)
	}
	for _, o := range w {
		if o.Call < 590 || (o.Return > 597 && o.Return != math.MaxInt64) {
			t.Errorf("%v has nothing to do with it", o)
		}
	}
}
