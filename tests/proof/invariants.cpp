// Each check of a soak lets a true history pass, and finds what is wrong with a broken one.
#include "proof/invariants.hpp"

#include <doctest/doctest.h>

#include <cstdio>

#include "support/process.hpp"

using namespace proof;

namespace {

Entry entry(const std::string& kind, const Json& in, const Json& out = {}, Is is = Is::Done,
            std::int64_t begin = 0, std::int64_t end = 1) {
  Entry made;
  made.process = 1;
  made.kind = kind;
  made.in = in;
  made.out = out;
  made.begin = begin;
  made.end = end;
  made.is = is;
  return made;
}
Entry write(const std::string& value, Is is, std::int64_t revision = 0) {
  return entry("write", {{"writes", {{"k", value}}}}, {{"revision", revision}}, is);
}
Change put(std::int64_t revision, const std::string& key, const std::string& value,
           std::int64_t created = 0) {
  return {revision, true, key, value, created};
}
Change removal(std::int64_t revision, const std::string& key) { return {revision, false, key}; }

}  // namespace

TEST_CASE("proof: a journal is read as it was written, also where its process died") {
  const support::TempDir folder;
  const auto path = folder.file("journal");
  using coordination::Error;
  using coordination::Result;
  {
    Journal journal(path);
    const auto out = [](const int& n) { return Json(n); };
    journal
        .call<int>(
            "good", {{"a", 1}}, [] { return Result<int>(7); }, out)
        .value();
    Error maybe{coordination::ErrorCode::Timeout, "", "", coordination::Outcome::MaybeApplied};
    CHECK_FALSE(journal.call<int>(
        "bad", {}, [&] { return Result<int>(maybe); }, out));
    journal.note("note", "x");
  }
  std::ofstream(path, std::ios::app) << R"({"n":4,"begin":9,"kind":"last","in":{}})"
                                     << "\n"
                                     << R"({"n":4,"end":1)";
  const auto entries = read_journal(path, 5);
  REQUIRE(entries.size() == 4);
  CHECK(entries[0].kind == "good");
  CHECK(entries[0].process == 5);
  CHECK(entries[0].in == Json{{"a", 1}});
  CHECK(entries[0].out == 7);
  CHECK(entries[0].done());
  CHECK(entries[0].begin <= entries[0].end);
  CHECK(entries[1].is == Is::MaybeApplied);
  CHECK(entries[1].code == "TIMEOUT_ERROR");
  CHECK(entries[2].in == "x");
  CHECK(entries[3].is == Is::MaybeApplied);
  CHECK(entries[3].end == kNever);
}

TEST_CASE("proof: without a checker there is none to be run") {
  CHECK(support::find_program("").empty());
  CHECK_FALSE(support::find_program("sh").empty());
}

TEST_CASE("proof: writes that are not as they were told") {
  const std::vector<Change> store{put(2, "k", "a"), put(3, "k", "b"), put(4, "k", "b")};
  const auto check = [&](const Entry& e) { return writes_are_as_told({{e}, store}).size(); };
  CHECK(check(write("a", Is::Done, 2)) == 0);
  CHECK(check(write("a", Is::MaybeApplied)) == 0);
  CHECK(check(write("x", Is::MaybeApplied)) == 0);
  CHECK(check(write("x", Is::NotApplied)) == 0);
  CHECK_MESSAGE(check(write("a", Is::Done, 3)) == 1, "another revision");
  CHECK_MESSAGE(check(write("x", Is::Done, 5)) == 1, "not there");
  CHECK_MESSAGE(check(write("a", Is::NotApplied)) == 1, "applied all the same");
  CHECK_MESSAGE(check(write("b", Is::Done, 3)) == 1, "twice");
  CHECK_MESSAGE(check(write("b", Is::MaybeApplied)) == 1, "twice");
}

TEST_CASE("proof: removals that are not as they were told") {
  const auto remove = [](std::int64_t revision) {
    return entry("remove", {{"key", "k"}}, {{"revision", revision}});
  };
  const std::vector<Change> store{put(2, "k", "a"), removal(3, "k"), put(5, "k", "b")};
  CHECK(removals_are_as_told({{remove(3)}, store}).empty());
  CHECK_MESSAGE(removals_are_as_told({{remove(4)}, store}).size() == 2, "and whose is that at 3?");
  CHECK(removals_are_as_told({{remove(3), remove(2)}, store}).size() == 1);
  CHECK_MESSAGE(removals_are_as_told({{remove(3), remove(3)}, store}).size() == 1, "twice");
  auto not_done = remove(0), maybe = remove(0), nothing = remove(4);
  not_done.is = Is::NotApplied;
  maybe.is = Is::MaybeApplied;
  nothing.out["deleted"] = 0;
  CHECK(removals_are_as_told({{not_done, maybe, nothing}, store}).empty());
  CHECK(removals_are_as_told({{remove(3), maybe}, store}).empty());
  CHECK_MESSAGE(removals_are_as_told({{not_done}, store}).size() == 1, "removed all the same");
  CHECK_MESSAGE(removals_are_as_told({{nothing}, store}).size() == 1, "removed all the same");
}

TEST_CASE("proof: registrations that are not as they were told") {
  const auto record = [](const char* n) { return Json{{"metadata", {{"n", n}}}}.dump(); };
  const auto told = [](const char* kind, std::int64_t revision, const char* n, Is is = Is::Done) {
    return entry(kind, {{"id", "a"}, {"n", n}}, {{"revision", revision}}, is);
  };
  const std::vector<Change> store{put(2, "/s/a", record("1")), removal(4, "/s/a"),
                                  put(5, "/s/a", record("1")), put(6, "/s/a", record("2"))};
  const auto check = [&](const Entry& e) {
    return registrations_are_as_told({{e}, store}, "/s/").size();
  };
  CHECK(check(told("register", 2, "1")) == 0);
  CHECK(check(told("register", 6, "2")) == 0);
  CHECK(check(told("register", 0, "2", Is::MaybeApplied)) == 0);
  CHECK(check(told("register", 0, "3", Is::MaybeApplied)) == 0);
  CHECK(check(told("register", 0, "3", Is::NotApplied)) == 0);
  CHECK(check(told("unregister", 4, "")) == 0);
  CHECK(check(told("unregister", 6, "", Is::MaybeApplied)) == 0);
  CHECK_MESSAGE(check(told("register", 3, "1")) == 1, "another revision");
  CHECK_MESSAGE(check(told("register", 7, "3")) == 1, "not there");
  CHECK_MESSAGE(check(told("register", 0, "2", Is::NotApplied)) == 1, "applied all the same");
  CHECK_MESSAGE(check(told("register", 0, "1", Is::MaybeApplied)) == 1, "twice");
  CHECK_MESSAGE(check(told("unregister", 3, "")) == 1, "still there");
}

namespace {

Change guarded(std::int64_t revision, const std::string& mode, const std::string& key, int token) {
  const Json by{{"mode", mode}, {"key", key}, {"token", token}};
  return put(revision, "/soak/guarded/q/", by.dump());
}

}  // namespace

TEST_CASE("proof: guarded writes of others than the owner") {
  std::vector<Change> store{put(2, "/q/a", "", 2), put(3, "/q/b", "", 3), put(4, "/q/c", "", 4)};
  const auto check = [&](const Change& change, bool first_goes = false) {
    auto all = store;
    if (first_goes) all.push_back(removal(5, "/q/a"));
    all.push_back(change);
    return guarded_writes_are_owners({{}, all}, 2).size();
  };
  CHECK(check(guarded(6, "exclusive", "/q/a", 2)) == 0);
  CHECK(check(guarded(6, "permit", "/q/b", 3)) == 0);
  CHECK(check(guarded(6, "shared", "/q/c", 4)) == 0);
  CHECK(check(guarded(6, "exclusive", "/q/b", 3), true) == 0);
  CHECK_MESSAGE(check(guarded(6, "exclusive", "/q/b", 3)) == 1, "not the first");
  CHECK_MESSAGE(check(guarded(6, "permit", "/q/c", 4)) == 1, "two are before it");
  CHECK_MESSAGE(check(guarded(6, "exclusive", "/q/a", 2), true) == 1, "not any more");
  CHECK_MESSAGE(check(guarded(6, "exclusive", "/q/a", 1)) == 1, "an older token of the same key");
}

namespace {

Entry acquire(const std::string& mode, int token, std::int64_t begin, std::int64_t end) {
  return entry("acquire", {{"queue", "q"}, {"mode", mode}}, {{"token", token}}, Is::Done, begin,
               end);
}
Entry release(const std::string& mode, int token, std::int64_t begin, Is is = Is::Done) {
  return entry("release", {{"queue", "q"}, {"mode", mode}, {"token", token}}, {}, is, begin,
               begin + 1);
}
Entry held(int token, std::int64_t begin, bool yes, const std::string& queue = "q") {
  return entry("held", {{"queue", queue}, {"token", token}}, {{"held", yes}}, Is::Done, begin,
               begin + 1);
}

std::size_t not_alone(const std::string& a, const std::string& b, std::vector<Entry> more) {
  std::vector<Entry> all{acquire(a, 1, 0, 10), acquire(b, 2, 0, 20)};
  all.insert(all.end(), more.begin(), more.end());
  return holders_are_alone({all, {}}, 2).size();
}

}  // namespace

TEST_CASE("proof: holders that are not alone") {
  const std::string x = "exclusive", s = "shared", p = "permit";
  CHECK(not_alone(x, x, {release(x, 1, 15)}) == 0);
  CHECK(not_alone(x, x, {release(x, 1, 25, Is::NotApplied)}) == 0);
  CHECK(not_alone(x, x, {held(1, 25, false)}) == 0);
  CHECK(not_alone(s, s, {release(s, 1, 25)}) == 0);
  CHECK(not_alone(p, p, {release(p, 1, 25)}) == 0);
  CHECK(not_alone(x, x, {release(x, 1, 25)}) == 1);
  CHECK(not_alone(x, x, {held(1, 25, true)}) == 1);
  CHECK(not_alone(s, x, {release(s, 1, 25)}) == 1);
  CHECK(not_alone(x, s, {release(x, 1, 25)}) == 1);
  const auto third = acquire(p, 3, 0, 22);
  CHECK(not_alone(p, p, {third, release(p, 1, 25), release(p, 2, 21)}) == 0);
  CHECK(not_alone(p, p, {third, release(p, 1, 25), release(p, 2, 25)}) == 1);
}

TEST_CASE("proof: a lock that was lost before its answer came was not held") {
  const auto late = acquire("exclusive", 1, 0, 30);
  const auto other = acquire("exclusive", 2, 0, 20);
  CHECK(holders_are_alone({{late, other, release("exclusive", 2, 40)}, {}}, 2).empty());
}

TEST_CASE("proof: where keys are deleted, held() may be told of it later") {
  auto first = acquire("exclusive", 1, 0, 10), second = acquire("exclusive", 2, 0, 20);
  first.in["queue"] = second.in["queue"] = "/soak/locks/robbed1/";
  const auto late = held(1, 25, true, "/soak/locks/robbed1/");
  CHECK(holders_are_alone({{first, second, late}, {}}, 2).empty());
}

TEST_CASE("proof: tokens that do not grow") {
  const std::string x = "exclusive";
  CHECK(tokens_grow({{acquire(x, 1, 0, 1), acquire(x, 2, 2, 3)}, {}}).empty());
  CHECK_MESSAGE(tokens_grow({{acquire(x, 2, 0, 3), acquire(x, 1, 2, 4)}, {}}).empty(), "at once");
  CHECK(tokens_grow({{acquire(x, 2, 0, 1), acquire(x, 1, 2, 3)}, {}}).size() == 1);
  CHECK(tokens_grow({{acquire(x, 2, 0, 1), acquire(x, 2, 2, 3)}, {}}).size() == 1);
  CHECK(tokens_grow({{acquire("permit", 2, 0, 1), acquire("permit", 1, 2, 3)}, {}}).empty());
}

TEST_CASE("proof: who was robbed and is not told") {
  CHECK(robbed_is_told({{release("exclusive", 1, 5)}, {}}, {2}).empty());
  CHECK(robbed_is_told({{release("exclusive", 2, 5, Is::NotApplied)}, {}}, {2}).empty());
  CHECK(robbed_is_told({{release("exclusive", 2, 5)}, {}}, {2}).size() == 1);
}

namespace {

Entry event(const Change& change) {
  return entry("event", {{"id", 1},
                         {"revision", change.revision},
                         {"type", change.put ? "PUT" : "DELETE"},
                         {"key", change.key},
                         {"value", change.value}});
}

}  // namespace

TEST_CASE("proof: watches that are not the store's history") {
  const std::vector<Change> store{put(2, "/w/a", "1"), put(3, "/w/a", "2"), put(3, "/w/b", "2"),
                                  put(4, "/x", "3"),   removal(5, "/w/a"),  put(6, "/w/a", "4")};
  const auto check = [&](std::vector<std::size_t> delivered) {
    std::vector<Entry> all{entry("watch", {{"id", 1}, {"prefix", "/w/"}, {"from", 3}})};
    for (const auto i : delivered) all.push_back(event(store[i]));
    return watches_are_complete({all, store}).size();
  };
  CHECK(check({1, 2, 4, 5}) == 0);
  CHECK_MESSAGE(check({1, 2}) == 0, "it may end anywhere");
  CHECK_MESSAGE(check({2, 4}) == 1, "the first is missing");
  CHECK_MESSAGE(check({1, 4, 5}) == 1, "half of a revision is missing");
  CHECK_MESSAGE(check({1, 2, 5}) == 1, "a removal is missing");
  CHECK_MESSAGE(check({1, 2, 2, 4}) == 1, "one comes twice");
  CHECK_MESSAGE(check({2, 1}) == 1, "out of order");
  CHECK_MESSAGE(check({0, 1}) == 1, "too early");
  CHECK_MESSAGE(check({1, 2, 4, 5, 5}) == 1, "more than there is");
}

TEST_CASE("proof: views that show what was not so") {
  const std::string service = R"({"id":"a","metadata":{"n":"v1"}})";
  const std::vector<Change> store{put(2, "/s/a", service), put(4, "/s/b", "x"), removal(6, "/s/a")};
  const auto check = [&](std::int64_t revision, const Json& state) {
    const Json in{{"prefix", "/s/"}, {"revision", revision}, {"state", state}};
    return views_are_true({{entry("view", in)}, store}).size();
  };
  CHECK(check(1, Json::object()) == 0);
  CHECK(check(3, {{"a", "v1"}}) == 0);
  CHECK(check(4, {{"a", "v1"}, {"b", "x"}}) == 0);
  CHECK(check(9, {{"b", "x"}}) == 0);
  CHECK(check(3, {{"a", "v1"}, {"b", "x"}}) == 1);
  CHECK(check(6, {{"a", "v1"}, {"b", "x"}}) == 1);
  CHECK(check(6, Json::object()) == 1);
  CHECK(check(6, {{"b", "y"}}) == 1);
}

TEST_CASE("proof: what does not end, or leaves something") {
  const auto ended = [](int threads, int descriptors) {
    return entry("ended", {{"threads", threads}, {"descriptors", descriptors}});
  };
  const auto reached = [](bool yes) { return entry("reached", {{"what", "x"}, {"yes", yes}}); };
  CHECK(everything_ends({{reached(true), ended(0, 0)}, {}}, {}).empty());
  CHECK(everything_ends({{reached(true)}, {}}, {1}).empty());
  CHECK_MESSAGE(everything_ends({{reached(true)}, {}}, {}).size() == 1, "it does not end");
  CHECK_MESSAGE(everything_ends({{reached(false), ended(0, 0)}, {}}, {}).size() == 1, "no event");
  CHECK_MESSAGE(everything_ends({{ended(1, 0)}, {}}, {}).size() == 1, "a thread");
  CHECK_MESSAGE(everything_ends({{ended(0, 1)}, {}}, {}).size() == 1, "a descriptor");
}
