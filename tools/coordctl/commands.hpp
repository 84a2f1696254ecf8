// coordctl's commands: what each is given, and what does it. Each returns an exit status or throws
// Failure or CoordinationError.
#pragma once

#include <map>

#include "common.hpp"

namespace coordctl {

struct LockArguments {
  std::string name;
  milliseconds ttl{30000};
  milliseconds timeout{0};  // 0 = as long as it takes
  milliseconds grace{5000};
  bool only_try{false}, shared{false};
  int permits{0};
  std::string value{};  // of elect: what is proclaimed
  std::vector<std::string> command;
};
int lock(const Settings& settings, const LockArguments& arguments);
int elect(const Settings& settings, const LockArguments& arguments);

struct OnceArguments {
  LockArguments lock;
  std::string slot;
  milliseconds keep{7 * 24 * 3600 * 1000};  // how long it is remembered that it was done
};
int once(const Settings& settings, const OnceArguments& arguments);

int leader(const Settings& settings, const std::string& name, bool watch);
/// `kind`: the folder of the queue, "locks", "semaphores" or "elections".
int who(const Settings& settings, const std::string& kind, const std::string& name);

struct ServiceArguments {
  ServiceInfo service;
  std::string check{};
  milliseconds interval{10000};
  milliseconds grace{5000};
  std::vector<std::string> command;
};
int service_register(const Settings& settings, const ServiceArguments& arguments);
int service_list(const Settings& settings, const std::string& name);
int service_watch(const Settings& settings, const std::string& name);

int config_get(const Settings& settings, const std::string& key);
/// `expected`: the revision of the last change, 0 = there must be none; negative = whatever it is.
int config_set(const Settings& settings, const std::string& key, const std::string& value,
               bool as_string, std::int64_t expected);
int config_remove(const Settings& settings, const std::string& key);
int config_list(const Settings& settings, const std::string& prefix);
int config_watch(const Settings& settings, const std::string& key, bool prefix,
                 const std::string& exec);
int config_edit(const Settings& settings, const std::string& key);

struct FileArguments {
  std::string file;    // "-" = standard input
  std::string prefix;  // what is looked at; "" = all
  bool prune{false};   // what is not in the file is removed
};
int config_diff(const Settings& settings, const FileArguments& arguments);
int config_import(const Settings& settings, const FileArguments& arguments);
int config_export(const Settings& settings, const std::string& prefix);

int status(const Settings& settings);
int dev_server(const Settings& settings, const std::string& listen);

}  // namespace coordctl
