// What all of coordctl's commands have in common: exit statuses, errors, output.
#pragma once

#include <coordination.hpp>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace coordctl {

using namespace coordination;
using Json = nlohmann::ordered_json;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

/// Exit statuses of coordctl's own. That of a command is passed on, 128 + N if signal N ended it.
enum Exit : int {
  kDone = 0,
  kDifferent = 1,     // config diff: there are differences
  kUsage = 64,        // the arguments are wrong
  kBadData = 65,      // a value, a key or a file that cannot be used
  kNotFound = 66,     // no such key, holder or leader
  kUnavailable = 69,  // etcd cannot be reached, or cannot serve
  kInternal = 70,     // an answer that makes no sense
  kSystem = 71,       // no process, no file
  kHeld = 75,         // somebody else holds it, or has changed it; or the time to wait was over
  kLost = 76,         // the lock or office was lost while the command ran
  kDenied = 77,       // wrong or missing credentials
  kNotExecutable = 126,
  kNoCommand = 127,
  kSignal = 128  // + N: signal N came while coordctl waited
};

/// Ends coordctl with this status, after a line on standard error.
struct Failure {
  int status;
  std::string text;
};

/// The Exit that stands for an error of the library's.
int exit_of(ErrorCode code);

struct Settings {
  CoordinatorOptions options;
  bool json{false};
  bool verbose{false};
};

/// "coordctl: text" on standard error.
void say(const std::string& text);
/// With control characters as \xNN: what stands in etcd shall not steer a terminal.
std::string printable(const std::string& text);
/// "3.2s", "250ms", "2m".
std::string to_text(milliseconds duration);

/// Whether standard output is a terminal; then there are headings, columns and colours.
bool on_terminal();
enum class Colour { Bold, Green, Yellow, Red };
/// As it is where there are no colours (no terminal, or NO_COLOR is set).
std::string coloured(const std::string& text, Colour colour);

/// With the logger that --verbose asks for.
CoordinatorOptions with_logger(const Settings& settings);
/// Throws.
Coordinator connect(const Settings& settings);

/// One line of JSON on standard output.
void print(const Json& json);

/// Rows: columns under headings on a terminal, else fields between tabs.
class Table {
 public:
  enum class Headings { OnTerminal, Never };
  explicit Table(std::vector<std::string> headings, Headings when = Headings::OnTerminal)
      : headed_(when == Headings::OnTerminal && on_terminal()), rows_{std::move(headings)} {}
  void add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  void print() const;

 private:
  bool headed_;
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace coordctl
