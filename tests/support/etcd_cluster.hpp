// A cluster of real etcds on this machine, every link of it through a proxy.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../conformance/gateway.hpp"
#include "etcd_server.hpp"
#include "tcp_proxy.hpp"

namespace support {

struct ClusterOptions {
  std::string binary;  // as in EtcdOptions
  std::size_t members{3};
  std::vector<std::string> flags;
};

/// Members are known by their numbers from 0 on. Clients reach member i through link(i), the other
/// members reach it through a proxy of its own, and the test itself by gateway(i) past both.
/// Threads: one at a time, but well() and gateway() from any.
class EtcdCluster {
 public:
  using Way = TcpProxy::Way;

  explicit EtcdCluster(ClusterOptions options = {}) : options_(std::move(options)) {
    const int attempts = 3;  // another program may take a port before etcd does
    for (int i = 0; i < attempts; ++i) {
      members_.clear();
      for (std::size_t k = 0; k < options_.members; ++k) members_.push_back(new_member(k));
      for (auto& member : members_) launch(*member, "new");
      if (comes_up()) return;
    }
    std::string said = "the cluster does not come up; its members said last";
    for (const auto& member : members_) said += "\n" + last_words(*member->server);
    throw std::runtime_error(said);
  }

  std::size_t size() const { return members_.size(); }
  TcpProxy& link(std::size_t i) { return members_.at(i)->link; }
  EtcdServer& server(std::size_t i) { return *members_.at(i)->server; }
  /// For clients: "127.0.0.1:port".
  std::string endpoint(std::size_t i) { return link(i).endpoint(); }
  gateway::Gateway gateway(std::size_t i) const {
    std::lock_guard<std::mutex> hold(mutex_);
    const std::string url = "http://127.0.0.1:" + std::to_string(members_.at(i)->client_port);
    return gateway::Gateway(transport_, url).with_token(token_);
  }
  /// For the test's own requests from now on.
  void set_token(std::string token) {
    std::lock_guard<std::mutex> hold(mutex_);
    token_ = std::move(token);
  }

  /// One POST past all proxies, with little patience.
  gateway::Reply ask(std::size_t i, const std::string& path, const gateway::Json& body,
                     milliseconds patience = 2s) const {
    return gateway(i).post(path, body.dump(), coordination::Context::with_timeout(patience));
  }
  /// The members with whom nothing is wrong, as far as this test knows.
  std::vector<std::size_t> well() const {
    std::lock_guard<std::mutex> hold(mutex_);
    std::vector<std::size_t> result;
    for (std::size_t i = 0; i < members_.size(); ++i) {
      if (members_[i]->well) result.push_back(i);
    }
    return result;
  }

  /// The member that leads, as those say that are well; size() if nobody knows.
  std::size_t leader() const {
    for (const std::size_t i : well()) {
      const auto found = index_of(leader_seen_by(i));
      if (found < size()) return found;
    }
    return size();
  }
  /// The member with this id; size() if there is none.
  std::size_t index_of(std::uint64_t id) const {
    const auto is = [id](const auto& member) { return id != 0 && member->id == id; };
    const auto found = std::find_if(members_.begin(), members_.end(), is);
    return static_cast<std::size_t>(found - members_.begin());
  }
  /// Waits until all members that are well follow one leader and serve.
  bool wait_healthy(milliseconds limit = 20s) {
    return wait_until([this] { return healthy(); }, lenient(limit));
  }
  /// Asks the leader to hand over to member `to`.
  bool hand_over(std::size_t to) {
    const std::size_t from = leader();
    if (from == to) return true;
    if (from == size()) return false;
    const gateway::Json body{{"targetID", std::to_string(members_.at(to)->id)}};
    return ask(from, "/v3/maintenance/transfer-leadership", body, 5s).status == 200 &&
           wait_until([&] { return leader() == to; }, lenient(5s));
  }

  // What can happen to a member. heal() and restart() undo it.

  void kill(std::size_t i) {
    set_well(i, false);
    link(i).refuse();
    server(i).kill9();
  }
  /// As an operator does it.
  void terminate(std::size_t i) {
    set_well(i, false);
    server(i).terminate(20s);  // from 3.6 on it waits for 8 s while there are watch streams
    link(i).refuse();
  }
  void restart(std::size_t i) {
    server(i).kill9();
    server(i).launch();
    require_serving(i, 20s);
    link(i).refuse(false);
    set_well(i, true);
  }
  void stop(std::size_t i) {
    set_well(i, false);
    server(i).stop_signal();
  }
  /// Takes all connections between it and the other members, or those that the others have made to
  /// it, or those that it has made.
  enum class Cut { Both, Inbound, Outbound };
  void cut_off(std::size_t i, Cut cut = Cut::Both) {
    set_well(i, false);
    if (cut != Cut::Outbound) members_.at(i)->peers.pause();
    if (cut == Cut::Inbound) return;
    for (std::size_t k = 0; k < size(); ++k) {
      if (k != i) members_[k]->peers.pause(Way::Both, hex(members_.at(i)->id));
    }
  }
  /// Clients' bytes to it (up) and from it (down) vanish; or only those of watch streams.
  void black_hole(std::size_t i, Way way = Way::Both, const std::string& label = "") {
    link(i).pause(way, label);
  }
  void delay_links(milliseconds each_way) {
    for (auto& member : members_) member->link.delay(each_way);
  }
  /// All members run and all links are open and fast again.
  void heal() {
    delay_links(0ms);
    for (auto& member : members_) {
      member->link.resume();
      member->peers.resume();
      if (!member->server) continue;
      member->server->continue_signal();
      if (!member->server->running()) member->server->launch();
    }
    for (std::size_t i = 0; i < size(); ++i) {
      if (!members_[i]->server) continue;
      require_serving(i, 30s);
      link(i).refuse(false);
      set_well(i, !members_[i]->learner);
    }
  }

  /// A member that is not there yet has a link that refuses: reserve() makes one.
  std::size_t reserve() {
    auto member = new_member(members_.size());
    member->link.refuse();
    member->well = false;
    std::lock_guard<std::mutex> hold(mutex_);
    members_.push_back(std::move(member));
    return members_.size() - 1;
  }
  /// Adds one of them to the cluster, with empty data.
  void add(std::size_t i, bool learner = false) {
    gateway::Json body{{"peerURLs", {members_.at(i)->peer_url()}}};
    if (learner) body["isLearner"] = true;
    gateway::Reply reply;
    const auto added = [&] {  // etcd refuses until the others have been connected for a while
      const auto leads = leader();
      if (leads == size()) return false;
      reply = ask(leads, "/v3/cluster/member/add", body, 5s);
      members_[i]->id = listed_id(leads, members_[i]->peer_url());  // also if the answer was lost
      return members_[i]->id != 0;
    };
    if (!wait_until(added, lenient(20s))) {
      throw std::runtime_error("a member cannot be added: " + reply.body);
    }
    launch(*members_[i], "existing");
    // etcd 3.7 may try for ever to publish a new member ("too many requests"), until it is
    // restarted.
    if (!server(i).serving(20s)) {
      server(i).kill9();
      server(i).launch();
    }
    require_serving(i, 60s);
    link(i).refuse(false);
    members_[i]->learner = learner;
    set_well(i, !learner);
  }
  void remove(std::size_t i) {
    set_well(i, false);
    const gateway::Json body{{"ID", std::to_string(members_.at(i)->id)}};
    const auto removed = [&] {
      const auto leads = leader();
      if (leads == size()) return false;
      const auto reply = ask(leads, "/v3/cluster/member/remove", body, 5s);
      return reply.status == 200 || reply.body.find("member not found") != std::string::npos;
    };
    if (!wait_until(removed, lenient(20s))) {
      throw std::runtime_error("a member cannot be removed");
    }
    const auto ended = [&] { return !members_[i]->server || !server(i).running(); };
    wait_until(ended, lenient(5s));  // etcd ends by itself
    link(i).refuse();
    members_[i]->server.reset();
    members_[i]->id = 0;
  }
  /// Takes the last member away for good; it must have been removed, or never added.
  void forget() {
    std::lock_guard<std::mutex> hold(mutex_);
    members_.pop_back();
  }

 private:
  struct Member {
    Member(int client, int peer)
        : client_port(client), peer_port(peer), link(client, watch_label), peers(peer, peer_label) {
    }
    std::string peer_url() const { return "http://" + peers.endpoint(); }

    int client_port, peer_port;
    TcpProxy link, peers;
    std::string name{};
    std::uint64_t id{0};
    bool well{true}, learner{false};
    std::unique_ptr<EtcdServer> server{};  // none: it is not there yet, or not any more
  };

  static std::string watch_label(std::string_view bytes) {
    return bytes.substr(0, 14) == "POST /v3/watch" ? "watch" : "";
  }
  /// Members say in every request who they are.
  static std::string peer_label(std::string_view bytes) {
    constexpr std::string_view kHeader = "X-Server-From: ";
    const auto at = bytes.find(kHeader);
    if (at == std::string_view::npos) return "";
    const auto begin = at + kHeader.size();
    return std::string(bytes.substr(begin, bytes.find('\r', begin) - begin));
  }
  static std::string hex(std::uint64_t id) {
    char text[17];
    std::snprintf(text, sizeof(text), "%llx", static_cast<unsigned long long>(id));
    return text;
  }
  static std::uint64_t unsigned_of(const gateway::Json& object, const char* name) {
    return object.contains(name) ? std::stoull(object[name].get<std::string>()) : 0;
  }

  static std::unique_ptr<Member> new_member(std::size_t i) {
    auto member = std::make_unique<Member>(free_port(), free_port());
    member->name = "m" + std::to_string(i);
    return member;
  }
  void launch(Member& member, const std::string& state) {
    std::string all;
    for (const auto& other : members_) {
      if (state == "existing" && other->id == 0) continue;
      all += (all.empty() ? "" : ",") + other->name + "=" + other->peer_url();
    }
    EtcdOptions options;
    options.binary = options_.binary;
    options.port = member.client_port;
    options.flags = {"--name=" + member.name,
                     "--advertise-client-urls=http://" + member.link.endpoint(),
                     "--listen-peer-urls=http://127.0.0.1:" + std::to_string(member.peer_port),
                     "--initial-advertise-peer-urls=" + member.peer_url(),
                     "--initial-cluster=" + all,
                     "--initial-cluster-state=" + state};
    options.flags.insert(options.flags.end(), options_.flags.begin(), options_.flags.end());
    member.server = std::make_unique<EtcdServer>(options);
  }

  /// The id of the member with this URL; 0 if there is none.
  std::uint64_t listed_id(std::size_t asked, const std::string& peer_url) const {
    const auto reply = ask(asked, "/v3/cluster/member/list", gateway::Json::object(), 5s);
    if (reply.status != 200) return 0;
    for (const auto& member : reply.json.value("members", gateway::Json::array())) {
      if (member["peerURLs"].at(0) == peer_url) return unsigned_of(member, "ID");
    }
    return 0;
  }
  bool comes_up() {
    const auto has_ended = [](const auto& member) { return !member->server->running(); };
    bool good = false;
    wait_until(
        [&] {
          good = healthy();
          return good || std::any_of(members_.begin(), members_.end(), has_ended);
        },
        lenient(30s));
    return good;
  }
  static std::string last_words(const EtcdServer& server) {
    const auto said = server.output();
    return said.substr(said.size() - std::min<std::size_t>(said.size(), 2000));
  }
  void require_serving(std::size_t i, milliseconds limit) {
    if (server(i).serving(limit)) return;
    throw std::runtime_error("a member does not serve; it said last\n" + last_words(server(i)));
  }
  void set_well(std::size_t i, bool well) {
    std::lock_guard<std::mutex> hold(mutex_);
    members_.at(i)->well = well;
  }
  std::uint64_t leader_seen_by(std::size_t i) const {
    const auto reply = ask(i, "/v3/maintenance/status", gateway::Json::object());
    return reply.status == 200 ? unsigned_of(reply.json, "leader") : 0;
  }
  bool healthy() {
    std::uint64_t leader = 0;
    for (const std::size_t i : well()) {
      const auto status = ask(i, "/v3/maintenance/status", gateway::Json::object());
      if (status.status != 200) return false;
      members_[i]->id = unsigned_of(status.json["header"], "member_id");
      const auto sees = unsigned_of(status.json, "leader");
      if (sees == 0 || (leader != 0 && sees != leader)) return false;
      leader = sees;
      if (ask(i, "/v3/kv/range", {{"key", gateway::b64("k")}}).status != 200) return false;
    }
    return leader != 0 && index_of(leader) < size();
  }

  const ClusterOptions options_;
  mutable std::mutex mutex_;  // of `well`, of the token and of the list
  std::shared_ptr<coordination::Transport> transport_{coordination::make_default_transport()};
  std::string token_;
  std::vector<std::unique_ptr<Member>> members_;
};

}  // namespace support
