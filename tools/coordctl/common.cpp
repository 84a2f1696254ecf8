#include "common.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

namespace coordctl {

int exit_of(ErrorCode code) {
  switch (code) {
    case ErrorCode::Connection:
    case ErrorCode::Timeout:
    case ErrorCode::Cancelled:
    case ErrorCode::Unavailable: return kUnavailable;
    case ErrorCode::NotFound: return kNotFound;
    case ErrorCode::Conflict: return kHeld;
    case ErrorCode::Validation: return kBadData;
    case ErrorCode::PermissionDenied: return kDenied;
    case ErrorCode::Lost: return kLost;
    default: return kInternal;
  }
}

CoordinatorOptions with_logger(const Settings& settings) {
  auto options = settings.options;
  if (settings.verbose) options.logger = stderr_logger(LogLevel::Debug);
  return options;
}

Coordinator connect(const Settings& settings) {
  return Coordinator::connect(with_logger(settings)).value();
}

void say(const std::string& text) { std::fprintf(stderr, "coordctl: %s\n", text.c_str()); }

std::string printable(const std::string& text) {
  std::string result;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    char hex[8];
    std::snprintf(hex, sizeof(hex), "\\x%02x", byte);
    result += byte < ' ' || byte == 0x7f ? std::string(hex) : std::string(1, c);
  }
  return result;
}

std::string to_text(milliseconds duration) {
  const auto ms = duration.count();
  char text[32];
  if (ms < 1000) {
    std::snprintf(text, sizeof(text), "%lldms", static_cast<long long>(ms));
  } else if (ms < 60000) {
    std::snprintf(text, sizeof(text), "%.3gs", static_cast<double>(ms) / 1000);
  } else {
    std::snprintf(text, sizeof(text), "%lldm", static_cast<long long>(ms / 60000));
  }
  return text;
}

bool on_terminal() {
  static const bool is = isatty(STDOUT_FILENO) == 1;
  return is;
}

std::string coloured(const std::string& text, Colour colour) {
  const char* refused = std::getenv("NO_COLOR");
  if (!on_terminal() || (refused && *refused)) return text;
  const char* codes[] = {"1", "32", "33", "31"};
  return std::string("\033[") + codes[static_cast<int>(colour)] + "m" + text + "\033[0m";
}

void print(const Json& json) {
  const auto text = json.dump(-1, ' ', false, Json::error_handler_t::replace);
  std::printf("%s\n", text.c_str());
  std::fflush(stdout);
}

void Table::print() const {
  std::vector<std::size_t> widths(rows_[0].size());
  for (const auto& row : rows_) {
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  for (std::size_t r = headed_ ? 0 : 1; r < rows_.size(); ++r) {
    std::string line;
    for (std::size_t i = 0; i < rows_[r].size(); ++i) {
      const auto& cell = rows_[r][i];
      const bool last = i + 1 == rows_[r].size();
      const std::string gap = on_terminal() ? std::string(widths[i] - cell.size() + 2, ' ') : "\t";
      line += cell + (last ? "" : gap);
    }
    std::printf("%s\n", (r == 0 ? coloured(line, Colour::Bold) : line).c_str());
  }
  std::fflush(stdout);
}

}  // namespace coordctl
