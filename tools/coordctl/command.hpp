// The command that coordctl runs: in its own process group, with nothing inherited but what
// coordctl was itself started with.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "signals.hpp"

namespace coordctl {

using Environment = std::vector<std::pair<std::string, std::string>>;

struct CommandOptions {
  Environment environment{};  // added to coordctl's own
  milliseconds grace{5000};   // between SIGTERM and SIGKILL when coordctl itself is killed
  int input{-1};              // becomes the standard input; -1 = coordctl's
  bool foreground{true};      // takes the terminal along, if coordctl has it
};

/// A process group that is signalled as a whole. If coordctl is killed by SIGKILL, a guard (a
/// process of its own) gives the group SIGTERM, and SIGKILL after the grace time.
class Command {
 public:
  /// Throws Failure with kNoCommand, kNotExecutable or kSystem. To be called by the main thread.
  Command(const std::vector<std::string>& argv, const Signals& signals,
          const CommandOptions& options = {});
  Command(const Command&) = delete;
  Command& operator=(const Command&) = delete;
  /// Kills what is left of the group if it was not reaped.
  ~Command();

  /// Its exit status, once it has ended: 128 + N if signal N ended it.
  std::optional<int> reap();
  /// True while a process of its group is there.
  bool group_lives() const;
  /// To all of its group, also to those that are stopped.
  void signal(int number) const;

 private:
  void start_guard(milliseconds grace);
  void take_terminal_back() const;

  pid_t pid_{-1};
  pid_t guard_{-1};
  int guard_socket_{-1};
  bool has_terminal_{false};
  std::optional<int> status_;
};

/// Which descriptors are open now, above standard error: those are for the commands, too. To be
/// called first in main().
void remember_descriptors();

/// For `sh -c`.
std::vector<std::string> shell(const std::string& command);

}  // namespace coordctl
