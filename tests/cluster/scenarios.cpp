// What a program sees while a cluster of three suffers in one way after the other.
//
// In a few minutes: each scenario once, with limits that hold on a busy machine. With
// COORDINATION_CLUSTER_ROUNDS=5: five times each, on every etcd of COORDINATION_ETCDS, with the
// limits of a quiet machine, and a table at the end.
#include <cstdio>

#include "etcds.hpp"
#include "load.hpp"

using namespace cluster;

namespace {

/// The cluster that scenarios share, as long as they leave it as they have found it.
class SharedCluster {
 public:
  EtcdCluster& of(const std::string& binary) {
    if (!cluster_ || binary_ != binary) {
      cluster_.reset();
      ClusterOptions options;
      options.binary = binary_ = binary;
      cluster_ = std::make_unique<EtcdCluster>(options);
    }
    return *cluster_;
  }
  void drop() { cluster_.reset(); }

 private:
  std::string binary_;
  std::unique_ptr<EtcdCluster> cluster_;
};

/// One round of a scenario.
struct Stage {
  EtcdCluster& etcd;
  std::size_t in_use;  // the member that the program talks to
  std::size_t leader;
  std::vector<std::string> endpoints;

  std::size_t other_than(std::size_t a) const { return (a + 1) % 3; }
  /// In the short form `shorter`.
  static void pass(milliseconds time, milliseconds shorter) {
    std::this_thread::sleep_for(is_long() ? time : shorter);
  }
};

enum class InUse { Leader, Follower, Either };  // Either: a round each

struct Scenario {
  std::string name;
  InUse in_use;
  std::function<void(Stage&)> strike;
  // Limits in seconds on a quiet machine.
  double gap{2.5};  // without a read, a write, or a program that begins
  double watch{3}, idle_watch{6};
  // A member passes writes on to its leader. Those that are with a leader when it dies or hands
  // over may never be answered, and nobody can tell: who writes one thing after the other waits for
  // the deadline.
  bool may_hang{false};
  bool gentle{false};    // no answer is lost at all
  bool misleads{false};  // a program that begins may believe another cluster
  // What is asked for without a quorum and then given up goes when its TTL is over.
  bool keeps_locks{true};
  std::function<void(Stage&)> prepare{};  // may change the endpoints
  std::function<void(Stage&)> clean_up{};
};

Scenario gently(Scenario scenario) {
  scenario.gentle = true;
  return scenario;
}

/// Where the leader goes while the program talks to another member.
Scenario with_hanging_writes(Scenario scenario) {
  scenario.may_hang = true;
  return scenario;
}

struct Row {
  int rounds{0};
  Outcomes worst{};  // gaps: the longest; counts: of all rounds

  void add(const Outcomes& one) {
    ++rounds;
    for (auto gap : {&Outcomes::read, &Outcomes::read_1s, &Outcomes::write, &Outcomes::write_2s,
                     &Outcomes::new_writes, &Outcomes::newcomers, &Outcomes::control,
                     &Outcomes::watch, &Outcomes::idle_watch, &Outcomes::worst_overrun}) {
      worst.*gap = std::max(worst.*gap, one.*gap);
    }
    for (auto count :
         {&Outcomes::locks, &Outcomes::locks_kept, &Outcomes::control_lost,
          &Outcomes::lies_of_locks, &Outcomes::registrations, &Outcomes::overrun, &Outcomes::events,
          &Outcomes::lost, &Outcomes::repeated, &Outcomes::reordered, &Outcomes::writes,
          &Outcomes::maybe, &Outcomes::lies, &Outcomes::keys_left, &Outcomes::leases_left}) {
      worst.*count += one.*count;
    }
  }
  std::string text() const {
    char line[300];
    std::snprintf(line, sizeof(line),
                  "%5.2f %5.2f | %5.2f %5.2f %5.2f (%5.2f) | %5.2f | %5.2f %5.2f | %3d/%-3d "
                  "(%3d/%-3d) | %3d %5.2f | "
                  "%6d %2d/%d/%d | %6d %3d %d | %d %d",
                  worst.read, worst.read_1s, worst.write, worst.write_2s, worst.new_writes,
                  worst.control, worst.newcomers, worst.watch, worst.idle_watch, worst.locks_kept,
                  worst.locks, Control::kLeases * rounds - worst.control_lost,
                  Control::kLeases * rounds, worst.overrun, worst.worst_overrun, worst.events,
                  worst.lost, worst.repeated, worst.reordered, worst.writes, worst.maybe,
                  worst.lies, worst.keys_left, worst.leases_left);
    return line;
  }
};

/// Printed at the end of the program.
class Table {
 public:
  ~Table() {
    if (rows_.empty()) return;
    std::printf(
        "\nLongest gaps in seconds: reads within 5 s, within 1 s | writes within 5 s, within 2 s, "
        "begun every 0.15 s (without the library)\n| programs that connect and read | events after "
        "their write, where there are calls, where there are none | locks kept (leases without\n"
        "the library) | calls late, by how much | events, lost/repeated/reordered | writes, maybe "
        "applied, lied about | keys left, leases left\n");
    for (const auto& [name, row] : rows_) {
      std::printf("%-48s %s\n", name.c_str(), row.text().c_str());
    }
  }
  void add(const std::string& name, const Outcomes& outcomes) {
    for (auto& [known, row] : rows_) {
      if (known == name) return row.add(outcomes);
    }
    rows_.emplace_back(name, Row{});
    rows_.back().second.add(outcomes);
  }

 private:
  std::vector<std::pair<std::string, Row>> rows_;
};

Table& table() {
  static Table one;
  return one;
}

std::string summary(const Outcomes& out) {
  char text[300];
  std::snprintf(text, sizeof(text),
                "no read for %.2f s, no write for %.2f s (new ones %.2f), events late by %.2f s "
                "(idle %.2f), %d of %d locks kept",
                out.read, out.write, out.new_writes, out.watch, out.idle_watch, out.locks_kept,
                out.locks);
  return text;
}

void judge(const Scenario& scenario, const Outcomes& out) {
  // On a busy machine everything takes a while longer, and an election may take etcd more than one
  // attempt, whoever asks.
  const double slack = (is_long() ? 0 : 2) + std::max(0.0, out.control - 2);
  const auto within = [&](double gap, double limit) { return gap <= limit + slack; };
  for (const auto& note : out.notes) MESSAGE(note);
  const auto limit_gap = [&](const char* what, double gap) {
    CHECK_MESSAGE(within(gap, scenario.gap), "no " << what << " for " << gap << " s");
  };
  limit_gap("read", out.read);
  limit_gap("write among many", out.new_writes);
  if (!scenario.misleads) limit_gap("connection", out.newcomers);
  if (!scenario.may_hang) limit_gap("write", out.write);
  if (scenario.gentle) limit_gap("read within 1 s", out.read_1s);
  if (scenario.gentle) limit_gap("write within 2 s", out.write_2s);
  CHECK_MESSAGE(within(out.watch, scenario.watch), "an event came after " << out.watch << " s");
  CHECK_MESSAGE(within(out.idle_watch, scenario.idle_watch),
                "an event came after " << out.idle_watch << " s where nothing else was done");
  CHECK_MESSAGE(out.worst_overrun <= (is_long() ? 0.1 : 2),
                out.worst_call << " took " << out.worst_overrun << " s longer");
  CHECK(out.events > 0);
  CHECK(out.lost == 0);
  CHECK(out.repeated == 0);
  CHECK(out.reordered == 0);
  CHECK(out.lies == 0);
  CHECK(out.lies_of_locks == 0);
  CHECK(out.registrations == 3);
  if (scenario.keeps_locks) CHECK(out.keys_left == 0);
  if (scenario.gentle) CHECK(out.leases_left == 0);
  if (scenario.keeps_locks && out.control_lost == 0) CHECK(out.locks_kept == out.locks);
}

/// A round: the member in use is the leader in every other one where the scenario leaves it open.
Outcomes play(const Scenario& scenario, EtcdCluster& etcd, int round) {
  REQUIRE(etcd.wait_healthy(30s));
  const bool lead =
      scenario.in_use == InUse::Leader || (scenario.in_use == InUse::Either && round % 2 == 0);
  const std::size_t leader = etcd.leader();
  REQUIRE(leader < 3);
  Stage stage{etcd, lead ? leader : (leader + 1) % 3, leader, {}};
  for (std::size_t k = 0; k < 3; ++k) {
    stage.endpoints.push_back(etcd.endpoint((stage.in_use + k) % 3));
  }
  if (scenario.prepare) scenario.prepare(stage);
  Load load(etcd, stage.endpoints);
  REQUIRE(load.warm_up());
  CHECK(etcd.index_of(load.member_in_use()) == stage.in_use);
  scenario.strike(stage);
  etcd.heal();
  REQUIRE(etcd.wait_healthy(30s));
  CHECK(load.moves_on());
  const Outcomes out = load.end();
  if (scenario.clean_up) scenario.clean_up(stage);
  return out;
}

void run(const Scenario& scenario) {
  static SharedCluster cluster;
  for (const auto& binary : binaries()) {
    for (int round = 0; round < std::max(1, rounds()); ++round) {
      try {
        const Outcomes out = play(scenario, cluster.of(binary), round);
        judge(scenario, out);
        MESSAGE(scenario.name << ": " << summary(out));
        table().add(version_of(binary) + "  " + scenario.name, out);
      } catch (...) {  // who knows in what state it is
        cluster.drop();
        throw;
      }
    }
  }
}

}  // namespace

TEST_CASE("calm") {
  run(gently({"calm", InUse::Either, [](Stage&) { Stage::pass(5s, 2s); }, 1, 1, 1}));
}

// etcd changes its members only while all have been connected for some seconds: so these are first.
TEST_CASE("a member added and removed") {
  Scenario change{"a member added and removed", InUse::Either, [](Stage& stage) {
                    if (is_long()) stage.etcd.add(stage.etcd.size() - 1);
                    Stage::pass(2s, 0s);
                    stage.etcd.remove(stage.in_use);
                    Stage::pass(3s, 2s);
                  }};
  change.prepare = [](Stage& stage) {  // the fourth is the one in use when it is removed
    stage.in_use = stage.etcd.reserve();
    const std::size_t fifth = stage.etcd.reserve();
    stage.etcd.add(stage.in_use);
    stage.endpoints.insert(stage.endpoints.begin(), stage.etcd.endpoint(stage.in_use));
    stage.endpoints.push_back(stage.etcd.endpoint(fifth));
  };
  change.clean_up = [](Stage& stage) {
    if (is_long()) stage.etcd.remove(stage.etcd.size() - 1);
    stage.etcd.forget();
    stage.etcd.forget();
  };
  run(gently(change));
}

TEST_CASE("a learner and a typo among the endpoints") {
  Scenario odd{"a learner and a typo among the endpoints", InUse::Either, [](Stage& stage) {
                 stage.etcd.kill(stage.in_use);
                 Stage::pass(5s, 3s);
                 stage.etcd.restart(stage.in_use);
               }};
  odd.prepare = [](Stage& stage) {
    const std::size_t learner = stage.etcd.reserve();
    stage.etcd.add(learner, true);
    const std::string typo = "127.0.0.1:" + std::to_string(closed_port());
    stage.endpoints.insert(stage.endpoints.begin(), typo);
    stage.endpoints.insert(stage.endpoints.begin() + 2, {stage.etcd.endpoint(learner), typo});
  };
  odd.clean_up = [](Stage& stage) {
    stage.etcd.remove(stage.etcd.size() - 1);
    stage.etcd.forget();
  };
  run(odd);
}

TEST_CASE("leader killed") {
  run(with_hanging_writes({"leader killed", InUse::Follower, [](Stage& stage) {
                             stage.etcd.kill(stage.leader);
                             Stage::pass(8s, 4s);
                             stage.etcd.restart(stage.leader);
                           }}));
}

TEST_CASE("member in use killed") {
  run({"member in use killed", InUse::Either, [](Stage& stage) {
         stage.etcd.kill(stage.in_use);
         Stage::pass(8s, 4s);
         stage.etcd.restart(stage.in_use);
       }});
}

TEST_CASE("leader stopped") {
  // etcd's own fault: when it goes on it may revoke leases that the others have kept alive.
  run(with_hanging_writes({"leader stopped", InUse::Follower, [](Stage& stage) {
                             stage.etcd.stop(stage.leader);
                             Stage::pass(8s, 5s);
                           }}));
}

TEST_CASE("member in use stopped") {
  run({"member in use stopped", InUse::Either, [](Stage& stage) {
         stage.etcd.stop(stage.in_use);
         Stage::pass(10s, 9s);
       }});
}

TEST_CASE("member in use cut off from the others") {
  run({"member in use cut off, both ways", InUse::Either, [](Stage& stage) {
         stage.etcd.cut_off(stage.in_use);
         Stage::pass(12s, 6s);
       }});
}

TEST_CASE("member in use cannot be reached by the others") {
  run({"member in use cut off, inbound", InUse::Leader, [](Stage& stage) {
         stage.etcd.cut_off(stage.in_use, EtcdCluster::Cut::Inbound);
         Stage::pass(15s, 9s);
       }});
}

TEST_CASE("member in use cannot reach the others") {
  run({"member in use cut off, outbound", InUse::Either, [](Stage& stage) {
         stage.etcd.cut_off(stage.in_use, EtcdCluster::Cut::Outbound);
         Stage::pass(15s, 6s);
       }});
}

TEST_CASE("client's link a black hole") {
  run({"client's link a black hole", InUse::Either, [](Stage& stage) {
         stage.etcd.black_hole(stage.in_use);
         Stage::pass(12s, 9s);
       }});
}

TEST_CASE("answers to the client vanish") {
  run({"client's link half a black hole", InUse::Either, [](Stage& stage) {
         stage.etcd.black_hole(stage.in_use, EtcdCluster::Way::Down);
         Stage::pass(12s, 6s);
       }});
}

TEST_CASE("the watch stream alone in a black hole") {
  // Its member answers all else, and a stream may be silent: nothing tells the two apart but TCP's
  // keep-alive, which the proxy answers. Events are late as long as it lasts, and none is lost.
  Scenario swallowed{"watch stream a black hole", InUse::Either, [](Stage& stage) {
                       stage.etcd.black_hole(stage.in_use, EtcdCluster::Way::Both, "watch");
                       Stage::pass(12s, 9s);
                     }};
  swallowed.watch = swallowed.idle_watch = is_long() ? 14 : 11;
  run(gently(swallowed));
}

TEST_CASE("every link slow") {
  run(gently({"every link 300 ms slow each way", InUse::Either, [](Stage& stage) {
                stage.etcd.delay_links(300ms);
                Stage::pass(10s, 5s);
              }}));
}

TEST_CASE("two of three away") {
  Scenario away{"two of three away", InUse::Either, [](Stage& stage) {
                  stage.etcd.kill(stage.in_use);
                  stage.etcd.kill(stage.other_than(stage.in_use));
                  Stage::pass(15s, 5s);
                  stage.etcd.heal();
                }};
  // Nobody can do anything meanwhile; what is measured is that it goes on soon afterwards.
  const double outage = is_long() ? 15 : 5;
  away.gap = outage + 4;
  away.keeps_locks = !is_long();
  run(away);
}

TEST_CASE("rolling restart") {
  run(with_hanging_writes({"rolling restart", InUse::Either, [](Stage& stage) {
                             for (std::size_t k = 0; k < (is_long() ? 3U : 1U); ++k) {
                               const std::size_t i = (stage.in_use + k) % 3;
                               stage.etcd.terminate(i);
                               Stage::pass(1s, 300ms);
                               stage.etcd.restart(i);
                               stage.etcd.wait_healthy();
                               Stage::pass(1s, 300ms);
                             }
                           }}));
}

TEST_CASE("a foreign cluster among the endpoints") {
  EtcdServer foreign;
  Scenario scenario{"a foreign cluster among the endpoints", InUse::Either, [](Stage& stage) {
                      stage.etcd.kill(stage.in_use);
                      Stage::pass(5s, 3s);
                      stage.etcd.restart(stage.in_use);
                    }};
  scenario.misleads = true;
  scenario.prepare = [&](Stage& stage) {
    stage.endpoints.insert(stage.endpoints.begin() + 1, foreign.endpoint());
  };
  run(scenario);
  const gateway::Gateway there(make_default_transport(), foreign.url());
  CHECK(there.revision() == 1);  // nothing was written to it
}
