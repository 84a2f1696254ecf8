#include "command.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <sstream>

extern char** environ;

namespace coordctl {

namespace {

std::vector<unsigned> given_descriptors;  // sorted, above standard error

/// The path of a program, as a shell finds it; empty if there is none.
std::string find_program(const std::string& name) {
  if (name.find('/') != std::string::npos) return name;
  const char* path = std::getenv("PATH");
  std::istringstream folders(path ? path : "/usr/bin:/bin");
  for (std::string folder; std::getline(folders, folder, ':');) {
    const std::string candidate = (folder.empty() ? "." : folder) + "/" + name;
    if (access(candidate.c_str(), X_OK) == 0) return candidate;
  }
  return "";
}

std::vector<char*> pointers(const std::vector<std::string>& strings) {
  std::vector<char*> result;
  for (const auto& text : strings) result.push_back(const_cast<char*>(text.c_str()));
  result.push_back(nullptr);
  return result;
}

std::vector<std::string> whole_environment(const Environment& added) {
  std::vector<std::string> result;
  for (const auto& [name, value] : added) result.push_back(name + "=" + value);
  const auto is_added = [&](const std::string& variable) {
    return std::any_of(added.begin(), added.end(), [&](const auto& pair) {
      return variable.compare(0, pair.first.size() + 1, pair.first + "=") == 0;
    });
  };
  for (char** variable = environ; *variable; ++variable) {
    if (!is_added(*variable)) result.emplace_back(*variable);
  }
  return result;
}

// --- After fork(): other threads may have held any lock, so nothing but system calls. ---------

void close_at_exec(unsigned first, unsigned last) {
  constexpr unsigned kCloseOnExec = 4;  // CLOSE_RANGE_CLOEXEC, of Linux 5.11
  if (syscall(SYS_close_range, first, last, kCloseOnExec) == 0) return;
  for (unsigned fd = first; fd <= std::min(last, 65535U); ++fd) {
    fcntl(static_cast<int>(fd), F_SETFD, FD_CLOEXEC);
  }
}

void keep_only_given_descriptors() {
  unsigned next = 3;
  for (const unsigned fd : given_descriptors) {
    if (fd > next) close_at_exec(next, fd - 1);
    next = fd + 1;
  }
  close_at_exec(next, ~0U);
}

struct Start {
  const char* program;
  char** argv;
  char** environment;
  const sigset_t* mask;
  int input;
  int report;
  bool take_terminal;
};

[[noreturn]] void become(const Start& start) {
  setpgid(0, 0);
  if (start.take_terminal) tcsetpgrp(STDIN_FILENO, getpid());
  if (start.input >= 0) dup2(start.input, STDIN_FILENO);
  keep_only_given_descriptors();
  sigprocmask(SIG_SETMASK, start.mask, nullptr);
  execve(start.program, start.argv, start.environment);
  const int error = errno;
  const auto written = write(start.report, &error, sizeof(error));
  _exit(written > 0 ? kNotExecutable : kNoCommand);
}

/// All signals are blocked here, and nobody waits for them.
[[noreturn]] void guard(int socket, pid_t group, milliseconds grace) {
  setpgid(0, 0);
  dup2(socket, STDIN_FILENO);
  if (syscall(SYS_close_range, 1U, ~0U, 0U) != 0) {
    for (int fd = 1; fd < 65536; ++fd) close(fd);
  }
  char byte = 0;
  if (read(STDIN_FILENO, &byte, 1) == 1) _exit(0);  // coordctl is done with the command
  kill(-group, SIGTERM);
  kill(-group, SIGCONT);
  const timespec pause{0, 20'000'000};
  for (auto i = grace.count() / 20; i > 0 && kill(-group, 0) == 0; --i) nanosleep(&pause, nullptr);
  kill(-group, SIGKILL);
  _exit(0);
}

void make_pipe(int (&ends)[2]) {
  if (pipe2(ends, O_CLOEXEC) != 0)
    throw Failure{kSystem, "no pipe: " + std::string(strerror(errno))};
}

/// What the child could not do; 0 if it runs.
int read_report(int fd) {
  int error = 0;
  while (read(fd, &error, sizeof(error)) < 0 && errno == EINTR) {
  }
  close(fd);
  return error;
}

}  // namespace

void remember_descriptors() {
  DIR* folder = opendir("/proc/self/fd");
  if (!folder) return;
  while (const dirent* entry = readdir(folder)) {
    const int fd = std::atoi(entry->d_name);
    if (fd > STDERR_FILENO && fd != dirfd(folder)) {
      given_descriptors.push_back(static_cast<unsigned>(fd));
    }
  }
  closedir(folder);
  std::sort(given_descriptors.begin(), given_descriptors.end());
}

std::vector<std::string> shell(const std::string& command) { return {"/bin/sh", "-c", command}; }

Command::Command(const std::vector<std::string>& argv, const Signals& signals,
                 const CommandOptions& options) {
  const auto program = find_program(argv.at(0));
  if (program.empty()) throw Failure{kNoCommand, argv[0] + ": no such command"};
  auto environment = whole_environment(options.environment);
  auto argv_pointers = pointers(argv), environment_pointers = pointers(environment);
  has_terminal_ =
      options.foreground && isatty(STDIN_FILENO) == 1 && tcgetpgrp(STDIN_FILENO) == getpgrp();
  int report[2];
  make_pipe(report);
  const Start start{program.c_str(),        argv_pointers.data(), environment_pointers.data(),
                    &signals.mask_before(), options.input,        report[1],
                    has_terminal_};
  pid_ = fork();
  if (pid_ == 0) become(start);
  close(report[1]);
  if (pid_ < 0) throw Failure{kSystem, "no process: " + std::string(strerror(errno))};
  setpgid(pid_, pid_);  // whoever of the two is first
  if (const int error = read_report(report[0])) {
    waitpid(pid_, nullptr, 0);
    take_terminal_back();
    throw Failure{error == ENOENT ? kNoCommand : kNotExecutable, argv[0] + ": " + strerror(error)};
  }
  start_guard(options.grace);
}

void Command::start_guard(milliseconds grace) {
  int ends[2];  // sockets: one that nobody reads any more can be told of without a SIGPIPE
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return;
  guard_ = fork();
  if (guard_ == 0) guard(ends[0], pid_, grace);
  close(ends[0]);
  guard_socket_ = ends[1];
}

Command::~Command() {
  if (!status_) {
    kill(-pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    take_terminal_back();
  }
  const bool told = guard_socket_ >= 0 && send(guard_socket_, "", 1, MSG_NOSIGNAL) == 1;
  if (told && guard_ > 0) waitpid(guard_, nullptr, 0);
  if (guard_socket_ >= 0) close(guard_socket_);
}

std::optional<int> Command::reap() {
  if (status_) return status_;
  int status = 0;
  const pid_t done = waitpid(pid_, &status, WNOHANG | WUNTRACED);
  if (done != pid_) return std::nullopt;
  if (WIFSTOPPED(status)) {
    // From the terminal: nobody could start it again, since coordctl does not stop with it.
    if (WSTOPSIG(status) == SIGTSTP && has_terminal_) signal(SIGCONT);
    return std::nullopt;
  }
  status_ = WIFEXITED(status) ? WEXITSTATUS(status) : kSignal + WTERMSIG(status);
  take_terminal_back();
  return status_;
}

bool Command::group_lives() const { return kill(-pid_, 0) == 0; }

void Command::signal(int number) const {
  kill(-pid_, number);
  if (number == SIGTERM) kill(-pid_, SIGCONT);
}

void Command::take_terminal_back() const {
  if (has_terminal_) tcsetpgrp(STDIN_FILENO, getpgrp());
}

}  // namespace coordctl
