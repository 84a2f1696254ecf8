// What happens to the cluster and to the workers of the soak, in an order that a seed decides.
#pragma once

#include <algorithm>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "recorder.hpp"
#include "support/child.hpp"
#include "workers.hpp"

namespace proof {

using support::EtcdCluster;
using support::TcpProxy;

/// Worker processes, each with its own way to every member; and one more, the sitter, that does
/// nothing but hold one lock for as long as it can, and watch everything.
class Workers {
 public:
  Workers(EtcdCluster& etcd, std::size_t count, std::uint64_t seed, std::string folder)
      : folder_(std::move(folder)), seed_(seed), sitter_(count) {
    for (std::size_t i = 0; i <= count; ++i) {
      slots_.push_back(std::make_unique<Slot>());
      for (std::size_t k = 0; k < etcd.size(); ++k) {
        slots_[i]->ways.push_back(std::make_unique<TcpProxy>(etcd.link(k).port()));
      }
      start(i);
    }
  }

  /// Without the sitter.
  std::size_t size() const { return sitter_; }
  std::size_t sitter() const { return sitter_; }
  std::string sitter_name() const { return holder_of(slots_[sitter_]->process); }
  void start(std::size_t i) {
    Slot& slot = *slots_.at(i);
    slot.process = ++count_;
    support::Args args{std::to_string(slot.process),
                       std::to_string(seed_ + 7919 * static_cast<std::uint64_t>(count_)),
                       journal_of(slot.process), i == sitter_ ? "sits" : "works"};
    for (const auto& way : slot.ways) args.push_back(way->endpoint());
    support::ProcessOptions options;
    options.output_file = folder_ + "/workers.log";
    slot.child.emplace(support::start_child("worker", args, options));
  }
  void kill(std::size_t i) {
    slots_.at(i)->child->kill9();
    killed_.insert(slots_[i]->process);
  }
  void stop(std::size_t i) { slots_.at(i)->child->stop_signal(); }
  void go_on(std::size_t i) { slots_.at(i)->child->continue_signal(); }
  void delay_answers(std::size_t i, milliseconds by) {
    for (auto& way : slots_.at(i)->ways) way->delay(by, TcpProxy::Way::Down);
  }
  void pause(std::size_t i, TcpProxy::Way way) {
    for (auto& each : slots_.at(i)->ways) each->pause(way);
  }
  void cut(std::size_t i) {
    for (auto& way : slots_.at(i)->ways) way->cut();
  }
  void heal(std::size_t i) {
    for (auto& way : slots_.at(i)->ways) {
      way->resume();
      way->delay(0ms);
    }
  }
  /// Asks all to end, and waits for it.
  void end() {
    for (auto& slot : slots_) slot->child->signal(SIGTERM);
    for (auto& slot : slots_) slot->child->wait(10min);
  }

  const std::set<int>& killed() const { return killed_; }
  /// The calls of all of them, in the order in which they began.
  std::vector<Entry> entries() const {
    std::vector<Entry> all;
    for (int process = 1; process <= count_; ++process) {
      auto some = read_journal(journal_of(process), process);
      std::move(some.begin(), some.end(), std::back_inserter(all));
    }
    std::stable_sort(all.begin(), all.end(),
                     [](const Entry& a, const Entry& b) { return a.begin < b.begin; });
    return all;
  }

 private:
  struct Slot {
    int process{0};
    std::vector<std::unique_ptr<TcpProxy>> ways;
    std::optional<support::Process> child;
  };
  std::string journal_of(int process) const {
    return folder_ + "/worker-" + std::to_string(process) + ".jsonl";
  }

  const std::string folder_;
  const std::uint64_t seed_;
  const std::size_t sitter_;
  int count_{0};
  std::set<int> killed_;
  std::vector<std::unique_ptr<Slot>> slots_;
};

/// One fault at a time, and a short rest after each; every one once before any comes again. What
/// happens to the sitter happens beside all that.
class Nemesis {
 public:
  /// It ends soon after `over` has become true. Threads: that may be called from any.
  Nemesis(EtcdCluster& etcd, Workers& workers, Recorder& recorder, std::uint64_t seed,
          std::function<bool()> over)
      : etcd_(etcd), workers_(workers), recorder_(recorder), over_(std::move(over)), random_(seed),
        sitters_random_(seed + 1) {}

  void run() {
    std::thread beside([this] { plague_sitter(); });
    std::vector<const Fault*> deck;
    while (!over_()) {
      if (deck.empty()) deck = shuffled();
      const Fault& fault = *deck.back();
      deck.pop_back();
      try {
        fault.second();
        ++counts_[fault.first];
      } catch (const std::exception& e) {  // a busy machine: the cluster takes longer than we wait
        const std::string why = e.what();
        std::cout << fault.first << " did not succeed: " << why.substr(0, why.find('\n'))
                  << std::endl;
        recover();
      }
      rest(500, 2000);
    }
    beside.join();
    counts_["late replies, then none"] = plagues_;
  }
  /// All is well again, however long it takes.
  void recover() {
    const auto healed = [this] {
      try {
        etcd_.heal();
        return true;
      } catch (const std::exception&) {
        return false;
      }
    };
    support::wait_until(healed, 5min);
    etcd_.wait_healthy();
  }
  const std::map<std::string, int>& counts() const { return counts_; }
  /// The tokens of locks whose keys it has deleted.
  const std::set<std::int64_t>& robbed() const { return robbed_; }
  /// When held() proves nothing.
  const std::vector<std::pair<std::int64_t, std::int64_t>>& blind() const { return blind_; }

 private:
  using Fault = std::pair<std::string, std::function<void()>>;
  using Cut = EtcdCluster::Cut;
  using Way = TcpProxy::Way;

  std::vector<Fault> make_faults() {
    return {
        {"kill a member", [this] { kill_member(); }},
        {"stop a member", [this] { stop_member(); }},
        {"cut a member off", [this] { harm([&](auto i) { etcd_.cut_off(i); }); }},
        {"cut one way, in", [this] { harm([&](auto i) { etcd_.cut_off(i, Cut::Inbound); }); }},
        {"cut one way, out", [this] { harm([&](auto i) { etcd_.cut_off(i, Cut::Outbound); }); }},
        {"delay", [this] { harm([&](auto) { etcd_.delay_links(dice(20, 300)); }); }},
        {"drop replies", [this] { drop_replies(); }},
        {"reset connections", [this] { reset_connections(); }},
        {"roll", [this] { roll(); }},
        {"hand the lead over", [this] { etcd_.hand_over(any_member()); }},
        {"add and remove a member", [this] { change_members(); }},
        {"compact", [this] { compact(); }},
        {"defragment", [this] { defragment(); }},
        {"expire leases", [this] { rob(false); }},
        {"delete lock keys", [this] { rob(true); }},
        {"switch authentication", [this] { switch_authentication(); }},
        {"kill a worker", [this] { kill_worker(); }},
        {"stop a worker", [this] { stop_worker(); }},
        {"cut a worker off", [this] { cut_worker(Way::Both); }},
        {"drop a worker's replies", [this] { cut_worker(Way::Down); }}};
  }
  std::vector<const Fault*> shuffled() {
    std::vector<const Fault*> deck;
    for (const Fault& fault : faults_) deck.push_back(&fault);
    std::shuffle(deck.begin(), deck.end(), random_);
    return deck;
  }

  std::size_t below(std::size_t n) {
    return std::uniform_int_distribution<std::size_t>(0, n - 1)(random_);
  }
  static milliseconds dice(std::mt19937_64& random, int least, int most) {
    return milliseconds(std::uniform_int_distribution<int>(least, most)(random));
  }
  milliseconds dice(int least, int most) { return dice(random_, least, most); }
  void rest(int least, int most) { sleep(dice(least, most)); }
  void sleep(milliseconds time) {
    const auto end = std::chrono::steady_clock::now() + time;
    while (!over_() && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(20ms);
  }
  /// One of those that vote.
  std::size_t any_member() { return below(3); }
  std::size_t any_worker() { return below(workers_.size()); }
  /// Asks those that are well until one does it.
  gateway::Reply ask(const std::string& path, const Json& body) {
    gateway::Reply reply;
    support::wait_until(
        [&] {
          for (const std::size_t i : etcd_.well()) {
            reply = etcd_.ask(i, path, body, 5s);
            if (reply.status == 200) return true;
          }
          return false;
        },
        20s);
    return reply;
  }

  /// The oldest key under a prefix; null if there is none.
  Json first_of(const std::string& prefix) {
    const auto reply = ask("/v3/kv/range", {{"key", gateway::b64(prefix)},
                                            {"range_end", gateway::b64(prefix_range_end(prefix))},
                                            {"sort_target", "CREATE"},
                                            {"sort_order", "ASCEND"},
                                            {"limit", "1"}});
    if (reply.status != 200 || !reply.json.contains("kvs")) return nullptr;
    return reply.json["kvs"][0];
  }

  // Members.

  void harm(const std::function<void(std::size_t)>& how) {
    how(any_member());
    rest(1000, 5000);
    recover();
  }
  void kill_member() {
    const auto i = any_member();
    etcd_.kill(i);
    rest(500, 4000);
    etcd_.restart(i);
    etcd_.wait_healthy();
  }
  /// A leader that was stopped revokes leases that others have kept alive meanwhile (etcd issue
  /// 15247): until that is over nobody can know that a lock is held.
  void stop_member() {
    const auto i = any_member();
    const bool leads = etcd_.leader() == i;
    etcd_.stop(i);
    rest(1000, 5000);
    const auto begin = now_ns();
    recover();
    if (leads) blind_.emplace_back(begin, now_ns() + 10'000'000'000);
  }
  void drop_replies() {
    const auto i = any_member();
    etcd_.black_hole(i, Way::Down);
    rest(300, 3000);
    etcd_.link(i).cut();
    recover();
  }
  void reset_connections() {
    for (int k = 0; k < 20; ++k) {
      etcd_.link(any_member()).cut();
      rest(20, 200);
    }
  }
  void roll() {
    for (std::size_t i = 0; i < 3; ++i) {
      etcd_.terminate(i);
      etcd_.restart(i);
      etcd_.wait_healthy();
    }
  }
  void change_members() {
    const std::size_t fourth = 3;
    try {
      etcd_.add(fourth);
      rest(1000, 3000);
    } catch (const std::exception&) {  // half a member is worse than none
      etcd_.remove(fourth);
      throw;
    }
    etcd_.remove(fourth);
    etcd_.wait_healthy();
  }
  void compact() { ask("/v3/kv/compaction", {{"revision", std::to_string(recorder_.revision())}}); }
  void defragment() {
    for (std::size_t i = 0; i < 3; ++i) {
      etcd_.ask(i, "/v3/maintenance/defragment", Json::object(), 10s);
    }
  }
  void switch_authentication() {
    ask("/v3/auth/enable", Json::object());
    rest(1000, 4000);
    const auto token = [&] {
      const auto reply =
          ask("/v3/auth/authenticate", {{"name", "root"}, {"password", "root-password"}});
      return reply.json.is_object() ? reply.json.value("token", "") : "";
    };
    etcd_.set_token(token());
    ask("/v3/auth/disable", Json::object());
    etcd_.set_token("");
  }

  /// For some seconds, whoever owns the lock loses its key or its lease, and hears of it late.
  void rob(bool key) {
    for (std::size_t i = 0; i < workers_.size(); ++i) workers_.delay_answers(i, 300ms);
    const auto end = std::chrono::steady_clock::now() + 4s;
    while (std::chrono::steady_clock::now() < end) {
      rob_once(key);
      rest(20, 200);
    }
    for (std::size_t i = 0; i < workers_.size(); ++i) workers_.heal(i);
  }
  void rob_once(bool key) {
    const Json kv = first_of(kRobbed);
    if (kv.is_null()) return;
    if (key) return delete_key(kv);
    ask("/v3/lease/revoke", {{"ID", kv["lease"]}});
  }
  void delete_key(const Json& kv) {
    const Json same{{"key", kv["key"]},
                    {"target", "CREATE"},
                    {"result", "EQUAL"},
                    {"create_revision", kv["create_revision"]}};
    const Json remove{{"request_delete_range", {{"key", kv["key"]}}}};
    const auto done = ask("/v3/kv/txn", {{"compare", {same}}, {"success", {remove}}});
    const bool ours = done.status == 200 && done.json.value("succeeded", false);
    if (ours) robbed_.insert(gateway::number(kv, "create_revision"));
  }

  // Workers.

  void kill_worker() {
    const auto i = any_worker();
    workers_.kill(i);
    rest(500, 3000);
    workers_.start(i);
  }
  void stop_worker() {
    const auto i = any_worker();
    workers_.stop(i);
    rest(1000, 8000);
    workers_.go_on(i);
  }
  void cut_worker(Way way) {
    const auto i = any_worker();
    workers_.pause(i, way);
    rest(1000, 8000);
    workers_.cut(i);
    workers_.heal(i);
  }

  // The sitter.

  void plague_sitter() {
    while (!over_()) {
      sleep(100ms);
      if (!sitter_holds()) continue;
      late_then_nothing();
      ++plagues_;
    }
  }
  bool sitter_holds() {
    const auto first = first_of(std::string(kPrefix) + "/locks/" + kSeat);
    return !first.is_null() && gateway::unb64(first.value("value", "")) == workers_.sitter_name();
  }
  /// A lease ends by the time at which its last renewal was sent, not by when it was answered: the
  /// answers come late, by half of the TTL, and then no request arrives any more.
  void late_then_nothing() {
    const auto i = workers_.sitter();
    workers_.delay_answers(i, std::chrono::seconds(kSeatTtl) / 2);
    sleep(dice(sitters_random_, 3000, 5000));
    workers_.pause(i, Way::Up);
    sleep(std::chrono::seconds(kSeatTtl) * 3 / 2 + 1s);
    workers_.cut(i);
    workers_.heal(i);
  }

  EtcdCluster& etcd_;
  Workers& workers_;
  Recorder& recorder_;
  const std::function<bool()> over_;
  std::mt19937_64 random_, sitters_random_;
  const std::vector<Fault> faults_{make_faults()};
  std::map<std::string, int> counts_;
  int plagues_{0};
  std::set<std::int64_t> robbed_;
  std::vector<std::pair<std::int64_t, std::int64_t>> blind_;
};

}  // namespace proof
