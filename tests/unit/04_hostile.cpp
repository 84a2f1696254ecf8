// Section 4 and what stands on it, against a server that means ill: each attack has an end, and
// takes a bounded amount of memory.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <functional>
#include <iterator>

#include "coordination.hpp"
#include "support/child.hpp"
#include "support/raw_server.hpp"
#include "support/scripted_transport.hpp"
#include "support/tls_files.hpp"

using namespace coordination;
using namespace support;

namespace {

const milliseconds kDeadline = sanitized() ? 3s : 1s;

long peak() { return support::detail::status_number("VmHWM") / 1024; }

/// "<milliseconds> <peak in MB> <peak before> <what came of it>", of a read or of a watch.
const bool kRegistered = child_main("victim", [](const Args& args) {
  CoordinatorOptions options;
  options.endpoints = {args.at(0)};
  auto connected = Coordinator::connect(options, Context::with_timeout(lenient(30s)));
  if (!connected) return say("0 0 0 cannot connect: " + text_of(connected)), 1;
  auto& client = connected->client();
  const auto before = std::to_string(peak());
  const Stopwatch watch;
  std::string end;
  const auto ctx = Context::with_timeout(kDeadline);
  if (args.at(1) == "get") {
    end = text_of(client.get("hit", ctx));
  } else {
    auto events = client.watch("hit", ctx);
    end = events ? text_of(events->next(ctx)) : text_of(events);
  }
  const auto time = watch.elapsed().count();
  say(std::to_string(time) + " " + std::to_string(peak()) + " " + before + " " +
      end.substr(0, 150));
  return 0;
});

/// Answers as etcd does, but for what is attacked: all reads after the first, or the watch streams.
RawServer::Serve hostile(bool watch, std::atomic<bool>& met, std::function<void(Wire&)> attack) {
  return [watch, &met, attack = std::move(attack)](Wire& wire) {
    while (true) {
      const auto request = wire.read_request();
      if (request.empty()) return;
      if (watch ? request.find("POST /v3/watch") == 0 : met.exchange(true)) return attack(wire);
      wire.send(http("200 OK", R"({"header":{"cluster_id":"1","member_id":"2","revision":"3"}})"));
    }
  };
}

struct Suffered {
  long time{0}, peak{0}, before{0};
  std::string end;
};

Suffered suffer(const char* call, const std::function<void(Wire&)>& attack) {
  std::atomic<bool> met{false};
  const RawServer server(hostile(call == std::string("watch"), met, attack));
  ProcessOptions options;
  options.env = {"ASAN_OPTIONS=quarantine_size_mb=8"};  // what was freed does not count
  Process victim = start_child("victim", {server.url(), call}, options);
  const auto line = victim.read_line(lenient(60s)).value_or("0 0 0 it crashed");
  Suffered suffered;
  int at = 0;
  std::sscanf(line.c_str(), "%ld %ld %ld %n", &suffered.time, &suffered.peak, &suffered.before,
              &at);
  suffered.end = line.substr(static_cast<std::size_t>(at));
  return suffered;
}

/// `first`, and then `more` for as long as somebody takes it.
std::function<void(Wire&)> flood(std::string first, std::string more) {
  return [=](Wire& wire) {
    wire.send(first);
    while (wire.send(more)) {
    }
  };
}

std::string gzip_bomb() {
  const TempDir folder;
  const auto file = folder.file("bomb.gz");
  REQUIRE(run({"sh", "-c", "head -c 100000000 /dev/zero | gzip -1 > " + file}, {}, 60s).ok());
  std::ifstream stream(file, std::ios::binary);
  const std::string bomb{std::istreambuf_iterator<char>(stream), {}};
  return "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: " +
         std::to_string(bomb.size()) + "\r\n\r\n" + bomb;
}

std::string repeated(const std::string& text, std::size_t size) {
  std::string all;
  all.reserve(size + text.size());
  while (all.size() < size) all += text;
  return all;
}

/// Each line of the table. Under AddressSanitizer a process at rest has 150 MB already: there it is
/// what the attack takes that counts. ThreadSanitizer remembers each byte some times over.
void row(const char* call, const char* title, const std::function<void(Wire&)>& attack,
         const std::string& essential) {
  auto suffered = suffer(call, attack);
  const long most = (kDeadline + lenient(100ms)).count();
  for (int i = 0; i < 9 && suffered.time > most; ++i) suffered = suffer(call, attack);  // busy
  std::printf("  %-5s %-38s %5ld ms %4ld MB  %s\n", call, title, suffered.time, suffered.peak,
              suffered.end.c_str());
  INFO(std::string(title));
  INFO(suffered.end);
  CHECK(suffered.time <= most);
  CHECK(suffered.peak > 0);
  CHECK(suffered.peak - (sanitized() ? suffered.before : 0) < (thread_sanitized() ? 400 : 150));
  CHECK(suffered.end.find(essential) != std::string::npos);
}

}  // namespace

TEST_CASE("hostile servers: the time that each takes, and the memory") {
  const std::string much(100'000, 'A');
  const std::string ok = "HTTP/1.1 200 OK\r\n";
  const auto both = [&](const char* title, const std::function<void(Wire&)>& attack,
                        const std::string& essential) {
    row("get", title, attack, essential);
    row("watch", title, attack, "TIMEOUT_ERROR");
  };
  both("a status line without end", flood("HTTP/1.1 200 ", much), "the head of the answer");
  both("a status line of 30000 letters",
       flood("HTTP/1.1 200 " + much.substr(0, 30'000) + "\r\n", "X-Filler: 123456789\r\n"),
       "the head of the answer");
  both("headers without end", flood(ok, repeated("X-Filler: 123456789\r\n", 60'000)),
       "the head of the answer");
  both("1xx heads without end", flood("", "HTTP/1.1 103 Early Hints\r\n\r\n"),
       "the head of the answer");
  both("a chunk size without end", flood(kChunkedHead, much), "");
  both("a chunked body without end", flood(kChunkedHead, chunk(much)), "");
  both("a body of 1 GB", flood(ok + "Content-Length: 1000000000\r\n\r\n", much), "");
  both("an error of 1 GB", flood("HTTP/1.1 500 Oh\r\nContent-Length: 1000000000\r\n\r\n", much),
       "");
  both("a bomb of gzip", flood(gzip_bomb(), much), "");
  both(
      "a head that dribbles", [](Wire& wire) { wire.dribble("HTTP/1.1 200 OK\r\nA: bcdef"); },
      "TIMEOUT_ERROR");
  both(
      "a body that dribbles",
      [&](Wire& wire) {
        wire.send(kChunkedHead);
        wire.dribble(chunk("{"));
      },
      "TIMEOUT_ERROR");
  both(
      "silence", [](Wire& wire) { wire.wait_for_end(); }, "TIMEOUT_ERROR");
  both("JSON that is deep", flood(http("200 OK", std::string(20'000'000, '[')), ""), "");
  both("JSON of many tiny values",
       flood(http("200 OK", "{\"header\":{},\"kvs\":[" +
                                repeated("{},", sanitized() ? 6'000'000 : 30'000'000) + "{}]}"),
             ""),
       "");
  row(
      "watch", "a stream that is confirmed and cut",
      [](Wire& wire) {
        wire.send(kChunkedHead + chunk("{\"result\":{\"header\":{\"revision\":\"3\"},"
                                       "\"created\":true,\"watch_id\":\"1\"}}\n"));
      },
      "TIMEOUT_ERROR");
}
