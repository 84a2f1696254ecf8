// Child processes that cannot outlive the test, temporary folders, free ports.
#pragma once

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "wait.hpp"

namespace support {

/// A folder of its own, in memory if there is /dev/shm; its destructor removes it.
class TempDir {
 public:
  TempDir() {
    const char* base = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    std::string name = std::string(base) + "/coordination-XXXXXX";
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp failed: " + name);
    path_ = name;
  }
  TempDir(TempDir&& other) noexcept : path_(std::exchange(other.path_, {})) {}
  TempDir& operator=(TempDir&&) = delete;
  ~TempDir() {
    std::error_code ignored;
    if (!path_.empty()) std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

/// The path of a program: as it is if it has a slash, else found in PATH; "" if there is none.
inline std::string find_program(const std::string& name) {
  if (name.empty()) return "";
  if (name.find('/') != std::string::npos) return access(name.c_str(), X_OK) == 0 ? name : "";
  const char* path = std::getenv("PATH");
  std::istringstream folders(path != nullptr ? path : "/usr/bin:/bin");
  for (std::string folder; std::getline(folders, folder, ':');) {
    const std::string candidate = folder + "/" + name;
    if (access(candidate.c_str(), X_OK) == 0) return candidate;
  }
  return "";
}

/// A socket that is bound to a free TCP port, below the range that the system hands out: so no
/// other program's connection takes it while a server is being restarted, and a client that knocks
/// at the closed port cannot be connected to itself. Sets `port`.
inline int bind_somewhere(in_addr_t where, int* port) {
  static std::mutex mutex;
  static std::mt19937 random{std::random_device{}()};
  std::lock_guard<std::mutex> hold(mutex);
  for (int attempt = 0; attempt < 1000; ++attempt) {
    *port = std::uniform_int_distribution<int>(10000, 31999)(random);
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<std::uint16_t>(*port));
    address.sin_addr.s_addr = htonl(where);
    if (bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0) return fd;
    close(fd);
  }
  throw std::runtime_error("no free TCP port");
}

/// A TCP port that is free now: another program may take it.
inline int free_port() {
  int port = 0;
  close(bind_somewhere(INADDR_ANY, &port));
  return port;
}

/// A port of 127.0.0.1 where nobody listens, nor will while this process lives.
inline int closed_port() {
  int port = 0;
  bind_somewhere(INADDR_LOOPBACK, &port);
  return port;
}

/// A socket that listens at a port of 127.0.0.1; sets `port`.
inline int listen_somewhere(int* port) {
  const int fd = bind_somewhere(INADDR_LOOPBACK, port);
  if (listen(fd, 64) != 0) throw std::runtime_error("cannot listen");
  return fd;
}

struct ProcessOptions {
  std::vector<std::string> env;  // "NAME=value", added to this process's own
  std::string output_file;       // stdout and stderr are appended to it; empty = see below
  bool merge_stderr{false};      // stderr goes into the pipe too, instead of to the test's stderr
  std::string work_dir;
};

/// A child process. Its stdout is a pipe to read from, unless it goes to a file. It is killed by
/// the destructor, and by the kernel when the thread that started it ends: so start it from a
/// thread that lives as long as it is needed.
class Process {
 public:
  explicit Process(const std::vector<std::string>& argv, const ProcessOptions& options = {}) {
    const std::string program = find_program(argv.at(0));
    if (program.empty()) throw std::runtime_error("no such program: " + argv.at(0));
    const int out = options.output_file.empty() ? open_pipe() : open_file(options.output_file);
    const bool both = options.merge_stderr || !options.output_file.empty();
    spawn(program, argv, options, out, both);
    close(out);
  }
  Process(Process&& other) noexcept
      : pid_(std::exchange(other.pid_, -1)), exit_code_(other.exit_code_),
        pipe_(std::exchange(other.pipe_, -1)), buffer_(std::move(other.buffer_)) {}
  Process& operator=(Process&&) = delete;
  ~Process() {
    kill9();
    if (pipe_ >= 0) close(pipe_);
  }

  pid_t pid() const { return pid_; }
  bool running() { return pid_ > 0 && !reap(WNOHANG); }
  void signal(int number) {
    if (running()) kill(pid_, number);
  }
  void stop_signal() {
    signal(SIGSTOP);
    // It is asynchronous: only a process that is seen to be stopped sends nothing more.
    wait_until([this] { return state() == 'T'; }, 2s);
  }
  void continue_signal() { signal(SIGCONT); }
  void kill9() {
    if (pid_ <= 0 || exit_code_) return;
    kill(pid_, SIGKILL);
    reap(0);
  }
  /// SIGTERM; SIGKILL if it does not end within `limit`. Returns its exit code.
  int terminate(milliseconds limit = 5s) {
    signal(SIGTERM);
    if (!wait(limit)) kill9();
    return exit_code_.value_or(-1);
  }
  /// Its exit code (128 + signal if a signal ended it); empty if it is still running.
  std::optional<int> wait(milliseconds limit) {
    wait_until([this] { return !running(); }, limit);
    return exit_code_;
  }

  /// One line of its output without the '\n'; empty at the end of the output or of the limit, see
  /// Stopwatch::over().
  std::optional<std::string> read_line(milliseconds limit) { return next_line({}, limit); }
  /// Reads lines until one begins with `start`, and returns the rest of that line.
  std::optional<std::string> read_until(const std::string& start, milliseconds limit) {
    const Stopwatch watch;
    for (;;) {
      auto line = next_line(watch, limit);
      if (!line) return std::nullopt;
      if (line->compare(0, start.size(), start) == 0) return line->substr(start.size());
    }
  }
  /// All of its output until it ends it, or until the limit.
  std::string read_all(milliseconds limit) {
    const Stopwatch watch;
    while (fill(watch, limit)) {
    }
    return std::exchange(buffer_, {});
  }

 private:
  int open_pipe() {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) throw std::runtime_error("pipe2 failed");
    pipe_ = ends[0];
    return ends[1];
  }
  static int open_file(const std::string& path) {
    const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd < 0) throw std::runtime_error("cannot write " + path);
    return fd;
  }

  static std::vector<char*> pointers(const std::vector<std::string>& strings) {
    std::vector<char*> result;
    for (const auto& s : strings) result.push_back(const_cast<char*>(s.c_str()));
    return result;
  }

  void spawn(const std::string& program, const std::vector<std::string>& argv,
             const ProcessOptions& options, int out, bool both) {
    auto args = pointers(argv);
    args.push_back(nullptr);
    auto env = pointers(options.env);
    for (char** variable = environ; *variable != nullptr; ++variable) env.push_back(*variable);
    env.push_back(nullptr);
    const pid_t parent = getpid();
    pid_ = fork();
    if (pid_ < 0) throw std::runtime_error("fork failed");
    if (pid_ > 0) return;
    // From here on nothing but system calls: other threads may have held any lock.
    setpgid(0, 0);  // Ctrl-C is for the test alone
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(126);
    dup2(out, 1);
    if (both) dup2(out, 2);
    syscall(SYS_close_range, 3U, ~0U, 0U);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);
    ::signal(SIGPIPE, SIG_DFL);
    if (!options.work_dir.empty() && chdir(options.work_dir.c_str()) != 0) _exit(126);
    execve(program.c_str(), args.data(), env.data());
    _exit(127);
  }

  /// True if it has ended.
  bool reap(int flags) {
    if (exit_code_) return true;
    int status = 0;
    if (waitpid(pid_, &status, flags) != pid_) return false;
    exit_code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    return true;
  }
  char state() const {
    std::ifstream stat("/proc/" + std::to_string(pid_) + "/stat");
    std::string text;
    std::getline(stat, text);
    const auto name_end = text.rfind(')');
    return name_end + 2 < text.size() ? text[name_end + 2] : '?';
  }
  std::optional<std::string> next_line(const Stopwatch& watch, milliseconds limit) {
    for (;;) {
      const auto newline = buffer_.find('\n');
      if (newline != std::string::npos) {
        std::string line = buffer_.substr(0, newline);
        buffer_.erase(0, newline + 1);
        return line;
      }
      if (!fill(watch, limit)) return std::nullopt;
    }
  }
  bool fill(const Stopwatch& watch, milliseconds limit) {
    pollfd readable{pipe_, POLLIN, 0};
    int ready = 0;
    while (ready == 0 && watch.over(limit) == 0) {
      const auto left = std::max<milliseconds>(10ms, limit - watch.elapsed());
      ready = poll(&readable, 1, static_cast<int>(left.count()));
    }
    if (ready <= 0) return false;
    char bytes[4096];
    const ssize_t n = read(pipe_, bytes, sizeof(bytes));
    if (n <= 0) return false;
    buffer_.append(bytes, static_cast<std::size_t>(n));
    return true;
  }

  pid_t pid_{-1};
  std::optional<int> exit_code_;
  int pipe_{-1};
  std::string buffer_;
};

struct RunResult {
  int exit_code{-1};  // -1: it did not end within the limit, and was killed
  std::string out;    // stdout and stderr
  bool ok() const { return exit_code == 0; }
};

/// Runs a program to its end.
inline RunResult run(const std::vector<std::string>& argv, ProcessOptions options = {},
                     milliseconds limit = 20s) {
  options.merge_stderr = true;
  Process process(argv, options);
  RunResult result;
  result.out = process.read_all(limit);
  result.exit_code = process.wait(2s).value_or(-1);
  return result;
}

}  // namespace support
