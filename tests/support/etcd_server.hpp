// A real etcd for tests, and etcdctl to look at it with.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "child.hpp"
#include "process.hpp"

namespace support {

struct EtcdOptions {
  std::string binary;               // empty = $COORDINATION_ETCD, else etcd from PATH
  std::vector<std::string> flags;   // added to the command line
  std::string scheme{"http"};       // "https" if the flags bring certificates
  std::string listen{"127.0.0.1"};  // or "[::1]"
  int port{0};                      // 0 = a free one; else it is started and not waited for
};

inline std::string etcd_program(const std::string& binary = "") {
  if (!binary.empty()) return find_program(binary);
  const char* named = std::getenv("COORDINATION_ETCD");
  return find_program(named != nullptr && *named != '\0' ? named : "etcd");
}

/// One etcd with its own ports and folder. It and its data are gone with this object.
class EtcdServer {
 public:
  explicit EtcdServer(EtcdOptions options = {}) : options_(std::move(options)) {
    port_ = options_.port;
    if (port_ != 0) {
      launch();
      return;
    }
    const int attempts = 10;  // another program may take the port before etcd does
    for (int i = 0; i < attempts; ++i) {
      port_ = free_port();
      if (start_once()) return;
      wipe();
    }
    throw std::runtime_error("etcd does not start:\n" + output());
  }
  EtcdServer(const EtcdServer&) = delete;
  EtcdServer& operator=(const EtcdServer&) = delete;

  int port() const { return port_; }
  /// "127.0.0.1:port".
  std::string endpoint() const { return options_.listen + ":" + std::to_string(port_); }
  std::string url() const { return options_.scheme + "://" + endpoint(); }
  pid_t pid() const { return process_->pid(); }
  bool running() const { return process_ && process_->running(); }
  const std::string& folder() const { return folder_.path(); }

  void kill9() { process_->kill9(); }
  void terminate(milliseconds limit = 5s) { process_->terminate(limit); }
  void stop_signal() { process_->stop_signal(); }
  void continue_signal() { process_->continue_signal(); }

  /// Starts it on the same port with the same data; see serving().
  void launch() {
    printed_before_ = output().size();
    ProcessOptions options;
    options.output_file = folder_.file("etcd.log");
    options.work_dir = folder_.path();
    process_ = std::make_unique<Process>(command_line(), options);
  }
  /// Waits until it serves; false if it ends before or does not within the limit.
  bool serving(milliseconds limit = 20s) {
    bool serves = false;
    wait_until(
        [&] {
          serves = output().find("serving client traffic", printed_before_) != std::string::npos;
          return serves || !process_->running();
        },
        lenient(limit));
    return serves && process_->running();
  }

  /// Kills it if it runs, and starts it on the same port with the same data.
  void restart() {
    process_->kill9();
    for (int i = 0; i < 3; ++i) {
      if (start_once()) return;
    }
    throw std::runtime_error("etcd does not start again:\n" + output());
  }
  /// The same, without its data.
  void wipe_and_restart() {
    process_->kill9();
    wipe();
    restart();
  }
  /// For the next start.
  void set_flags(std::vector<std::string> flags) { options_.flags = std::move(flags); }

  /// What etcd has printed.
  std::string output() const {
    std::ifstream file(folder_.file("etcd.log"));
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
  }

 private:
  std::vector<std::string> command_line() const {
    // The peer address is never used: a unix socket in the folder saves a port.
    const std::string peer = "unix://peer:1";
    std::vector<std::string> argv{etcd_program(options_.binary),
                                  "--name=test",
                                  "--data-dir=data",
                                  "--logger=zap",
                                  "--log-outputs=stderr",
                                  "--listen-client-urls=" + url(),
                                  "--advertise-client-urls=" + url(),
                                  "--listen-peer-urls=" + peer,
                                  "--initial-advertise-peer-urls=" + peer,
                                  "--initial-cluster=test=" + peer};
    argv.insert(argv.end(), options_.flags.begin(), options_.flags.end());
    return argv;
  }

  bool start_once() {
    launch();
    return serving();
  }

  void wipe() {
    std::error_code ignored;
    std::filesystem::remove_all(folder_.file("data"), ignored);
  }

  EtcdOptions options_;
  TempDir folder_;
  int port_{0};
  std::size_t printed_before_{0};  // by earlier starts
  std::unique_ptr<Process> process_;
};

/// One etcd for all tests that break nothing. Each keeps to a key prefix of its own.
inline EtcdServer& shared_etcd() {
  static EtcdServer server;
  return server;
}

/// Different for every call: "/t1", "/t2", ... to be used as CoordinatorOptions::key_prefix.
inline std::string unique_prefix() {
  static std::atomic<int> count{0};
  return "/t" + std::to_string(++count);
}

/// etcdctl for one server.
class Etcdctl {
 public:
  explicit Etcdctl(const EtcdServer& server, std::vector<std::string> flags = {})
      : base_{"etcdctl", "--endpoints=" + server.url(), "--dial-timeout=20s",
              "--command-timeout=20s"} {
    base_.insert(base_.end(), flags.begin(), flags.end());
  }

  RunResult run(const std::vector<std::string>& args) const {
    return support::run(command(args), options());
  }
  /// In the background; its destructor kills it. `etcdctl lock` gives the lock back at SIGTERM.
  Process start(const std::vector<std::string>& args) const {
    return Process(command(args), options());
  }

  bool put(const std::string& key, const std::string& value) const {
    return run({"put", "--", key, value}).ok();
  }
  /// The value alone; "" if there is no such key.
  std::string get(const std::string& key) const {
    std::string out = run({"get", "--print-value-only", key}).out;
    if (!out.empty() && out.back() == '\n') out.pop_back();
    return out;
  }
  std::vector<std::string> keys(const std::string& prefix) const {
    std::istringstream out(run({"get", "--prefix", "--keys-only", prefix}).out);
    std::vector<std::string> result;
    for (std::string line; std::getline(out, line);) {
      if (!line.empty()) result.push_back(line);
    }
    return result;
  }
  /// The ids of all leases, in hex.
  std::vector<std::string> leases() const {
    std::istringstream out(run({"lease", "list"}).out);
    std::vector<std::string> result;
    std::string line;
    std::getline(out, line);  // "found N leases"
    while (std::getline(out, line)) result.push_back(line);
    return result;
  }

 private:
  static ProcessOptions options() {
    ProcessOptions options;
    options.env = {"ETCDCTL_API=3"};
    return options;
  }
  std::vector<std::string> command(const std::vector<std::string>& args) const {
    auto argv = base_;
    argv.insert(argv.end(), args.begin(), args.end());
    return argv;
  }

  std::vector<std::string> base_;
};

/// Switches authentication on: root/root-password, and a user who may do everything under
/// `prefix` only.
inline bool enable_auth(const EtcdServer& server, const std::string& user,
                        const std::string& password, const std::string& prefix) {
  const Etcdctl ctl(server);
  const std::vector<std::vector<std::string>> steps{
      {"user", "add", "root:root-password"},
      {"user", "grant-role", "root", "root"},
      {"role", "add", user + "-role"},
      {"role", "grant-permission", user + "-role", "readwrite", "--prefix=true", prefix},
      {"user", "add", user + ":" + password},
      {"user", "grant-role", user, user + "-role"},
      {"auth", "enable"}};
  for (const auto& step : steps) {
    const auto done = [&] {
      const auto result = ctl.run(step);
      const auto says = [&](const char* text) {
        return result.out.find(text) != std::string::npos;
      };
      // 3.4 wants the role root to be made by hand, 3.5 has it from the start. On a busy machine
      // etcd may say that there was no time, and have done it.
      return result.ok() || says("already exists") ||
             (step[0] == "auth" && says("user name is empty"));
    };
    if (!wait_until(done, lenient(20s))) return false;
  }
  return true;
}

}  // namespace support
