// coordctl: locks, elections, services and configuration on etcd, for the shell.
#include <CLI/CLI.hpp>

#include <cstdio>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

#include "command.hpp"
#include "commands.hpp"
#include "dev_server.hpp"
#include "signals.hpp"

namespace coordctl {

int dev_server(const Settings& settings, const std::string& listen) {
  const auto colon = listen.rfind(':');
  auto host = listen.substr(0, colon);
  const auto port = colon == std::string::npos ? 2379 : std::atoi(listen.c_str() + colon + 1);
  Inbox inbox;
  Signals signals(inbox);
  DevServer server(std::make_shared<MemoryEtcd>(), host.empty() ? "127.0.0.1" : host, port);
  const auto url =
      "http://" + (host.empty() ? "127.0.0.1" : host) + ":" + std::to_string(server.port());
  if (settings.json) {
    print(Json{{"url", url}});
  } else {
    std::printf("an etcd in memory listens on %s; all is gone when it ends\n", url.c_str());
    std::fflush(stdout);
  }
  for (int signal = 0; signal == 0;) {
    const auto event = inbox.wait();
    if (event && Signals::ends(event->signal)) signal = event->signal;
  }
  return kDone;
}

namespace {

using Action = std::function<int()>;

/// "30s", "250ms", "5m", "2h", "7d"; a number alone is in seconds.
milliseconds parse_duration(const std::string& text) {
  const std::pair<const char*, double> units[] = {
      {"", 1000}, {"ms", 1}, {"s", 1000}, {"m", 60'000}, {"h", 3'600'000}, {"d", 86'400'000}};
  std::size_t end = 0;
  double number = -1;
  try {
    number = std::stod(text, &end);
  } catch (const std::exception&) {
  }
  for (const auto& [unit, factor] : units) {
    const double ms = number * factor;
    if (text.substr(end) == unit && ms >= 1 && ms < 1e13) {
      return milliseconds(static_cast<std::int64_t>(ms));
    }
  }
  throw CLI::ValidationError("\"" + text + "\" is no duration: 30s, 250ms, 5m, 2h, 7d");
}

void duration(CLI::App& app, const std::string& name, milliseconds& target,
              const std::string& help) {
  app.add_option_function<std::string>(
         name, [&target](const std::string& text) { target = parse_duration(text); }, help)
      ->type_name("TIME");
}

/// Everything that can be typed, and what is to be done then.
class CommandLine {
 public:
  explicit CommandLine(std::vector<std::string> arguments);
  /// Returns the exit status.
  int run();

 private:
  CLI::App& add(CLI::App& parent, const std::string& name, const std::string& help,
                const std::string& examples, Action action);
  void add_connection();
  void add_lock(LockArguments& arguments, CLI::App& app);
  void add_locks();
  void add_services();
  void add_configs();
  void add_rest();
  std::vector<std::string> take_command();

  CLI::App app_{"Locks, elections, services and configuration on etcd.", "coordctl"};
  std::vector<std::string> arguments_;
  std::vector<std::string> command_;  // what stands behind "--"
  bool has_command_{false};
  Action action_;
  CLI::App* chosen_{nullptr};

  Settings settings_;
  std::string user_;
  LockArguments lock_;
  OnceArguments once_;
  ServiceArguments service_;
  std::vector<std::string> metadata_;
  FileArguments file_;
  std::string name_, value_, exec_, listen_{"127.0.0.1:2379"};
  std::int64_t revision_{-1};
  bool flag_{false}, semaphore_{false}, election_{false};
};

CommandLine::CommandLine(std::vector<std::string> arguments) {
  const auto end = std::find(arguments.begin(), arguments.end(), "--");
  has_command_ = end != arguments.end();
  if (has_command_) command_.assign(end + 1, arguments.end());
  arguments_.assign(arguments.begin(), end);
  settings_.options = options_from_env();
  app_.set_version_flag("--version", "coordctl " + std::to_string(COORDINATION_VERSION_MAJOR) +
                                         "." + std::to_string(COORDINATION_VERSION_MINOR) + "." +
                                         std::to_string(COORDINATION_VERSION_PATCH));
  app_.set_help_all_flag("--help-all", "The help of all commands");
  app_.fallthrough();
  app_.require_subcommand(1);
  app_.footer("coordctl COMMAND --help says more, with examples; so does `man coordctl`.");
  add_connection();
  add_locks();
  add_services();
  add_configs();
  add_rest();
}

CLI::App& CommandLine::add(CLI::App& parent, const std::string& name, const std::string& help,
                           const std::string& examples, Action action) {
  auto* app = parent.add_subcommand(name, help);
  if (!examples.empty()) app->footer("Examples:\n" + examples);
  if (!action) return app->require_subcommand(1), *app;
  app->callback([this, app, action = std::move(action)] {
    chosen_ = app;
    action_ = action;
  });
  return *app;
}

void CommandLine::add_connection() {
  auto& options = settings_.options;
  auto& tls = options.tls;
  const auto group = "Connection (defaults from etcdctl's ETCDCTL_... variables)";
  app_.add_option("--endpoints", options.endpoints, "[http[s]://]host:port of the members")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->group(group);
  app_.add_option("--user", user_, "name[:password]")->group(group);
  app_.add_option("--password", options.password, "In place of the one in --user")->group(group);
  app_.add_option("--cacert", tls.ca_file, "The CA of etcd's certificates, PEM")->group(group);
  app_.add_option("--cert", tls.cert_file, "Client certificate, PEM")->group(group);
  app_.add_option("--key", tls.key_file, "Its key, PEM")->group(group);
  app_.add_flag_callback(
          "--insecure-skip-tls-verify", [&tls] { tls.verify_server = false; },
          "Believe any certificate")
      ->group(group);
  duration(app_, "--command-timeout", options.timeout, "Of a call that does not wait (5s)");
  app_.add_option("--key-prefix", options.key_prefix, "Before all keys, as /shop")
      ->envname("COORDINATION_KEY_PREFIX");
  app_.add_flag("--json", settings_.json, "For machines: one line of JSON for each result");
  app_.add_flag("--verbose", settings_.verbose, "The library's log on standard error");
}

void CommandLine::add_lock(LockArguments& arguments, CLI::App& app) {
  app.add_option("name", arguments.name, "Segments joined by /")->required();
  duration(app, "--ttl", arguments.ttl, "How long it outlives coordctl (30s)");
  duration(app, "--timeout", arguments.timeout, "How long to wait for it (as long as it takes)");
  duration(app, "--grace", arguments.grace, "From SIGTERM to SIGKILL once it is lost (5s)");
}

void CommandLine::add_locks() {
  auto& lock_app = add(app_, "lock", "Run a command while holding a lock: lock NAME -- COMMAND",
                       "  coordctl lock backup -- /usr/local/bin/backup\n"
                       "  coordctl lock --try deploy -- make deploy   # status 75 if it is held\n"
                       "  coordctl lock --permits 3 downloads -- curl -O https://example.org/x",
                       [this] { return lock(settings_, lock_); });
  add_lock(lock_, lock_app);
  lock_app.add_flag("--try", lock_.only_try, "Do not wait");
  auto* shared = lock_app.add_flag("--shared", lock_.shared, "Together with others that share it");
  lock_app.add_option("--permits", lock_.permits, "One of so many permits, not an exclusive lock")
      ->check(CLI::PositiveNumber)
      ->excludes(shared);

  auto& elect_app = add(app_, "elect", "Run a command while leading: elect NAME -- COMMAND",
                        "  coordctl elect --value $(hostname):8080 scheduler -- ./scheduler",
                        [this] { return elect(settings_, lock_); });
  add_lock(lock_, elect_app);
  elect_app.add_option("--value", lock_.value, "What is proclaimed (host:process)");

  auto& once_app = add(app_, "once", "Run a command once in a cluster: once NAME SLOT -- COMMAND",
                       "  # in each machine's crontab; who is late finds that it was done\n"
                       "  0 3 * * *  coordctl once nightly $(date +\\%F) -- /usr/local/bin/nightly",
                       [this] { return once(settings_, once_); });
  add_lock(once_.lock, once_app);
  once_app.add_option("slot", once_.slot, "Which time it is: once for each")->required();
  duration(once_app, "--keep", once_.keep, "How long it is remembered that it was done (7d)");

  auto& leader_app = add(app_, "leader", "Who leads",
                         "  coordctl leader scheduler\n  coordctl leader --watch scheduler",
                         [this] { return leader(settings_, name_, flag_); });
  leader_app.add_option("name", name_, "Of the election")->required();
  leader_app.add_flag("--watch", flag_, "Every other leader, too");

  auto& who_app = add(
      app_, "who", "Who holds a lock, and who waits for it",
      "  coordctl who backup\n  coordctl who --semaphore downloads", [this] {
        return who(settings_, semaphore_ ? "semaphores" : election_ ? "elections" : "locks", name_);
      });
  who_app.add_option("name", name_, "Of the lock")->required();
  who_app.add_flag("--semaphore", semaphore_, "It is one with permits");
  who_app.add_flag("--election", election_, "It is an election");
}

void CommandLine::add_services() {
  auto& service = add(app_, "service", "Services: register, list, watch", "", {});
  auto& one = add(service, "register", "Be found until a signal comes, or the command ends",
                  "  coordctl service register web --id web-1 --address 10.0.0.7 --port 80 \\\n"
                  "    --meta zone=a --check 'curl -fs localhost/health' -- ./server",
                  [this] { return service_register(settings_, service_); });
  auto& info = service_.service;
  one.add_option("name", info.name, "Of the service")->required();
  one.add_option("--id", info.id, "Of this instance")->required();
  one.add_option("--address", info.address, "Where it is")->required();
  one.add_option("--port", info.port, "And on which port")->required()->check(CLI::Range(1, 65535));
  one.add_option("--meta", metadata_, "name=value, repeatedly")->allow_extra_args(false);
  duration(one, "--ttl", info.ttl, "How long the record outlives coordctl (30s)");
  one.add_option("--check", service_.check, "For sh: it is registered while this succeeds");
  duration(one, "--interval", service_.interval, "From check to check, and the limit of one (10s)");

  auto& list = add(service, "list", "The instances of a service, or of all",
                   "  coordctl service list web\n  coordctl --json service list",
                   [this] { return service_list(settings_, name_); });
  list.add_option("name", name_, "Of the service");
  auto& watch =
      add(service, "watch", "What is there, and every change", "  coordctl service watch web",
          [this] { return service_watch(settings_, name_); });
  watch.add_option("name", name_, "Of the service")->required();
}

void CommandLine::add_configs() {
  auto& config =
      add(app_, "config", "Configuration: get, set, remove, list, watch, edit, ...", "", {});
  const auto keyed = [&](const char* name, const char* help, const char* examples, Action action) {
    auto& app = add(config, name, help, examples, std::move(action));
    app.add_option("key", name_, "Segments joined by /")->required();
    return &app;
  };
  keyed("get", "A value: a string as it is, else JSON", "  coordctl config get app/rate",
        [this] { return config_get(settings_, name_); });
  auto* set = keyed("set", "Write a value: JSON if it is some, else a string",
                    "  coordctl config set app/rate 100\n"
                    "  coordctl config set --string app/zip 01234\n"
                    "  coordctl config set --if-revision 7 app/rate 200   # status 75 if changed\n"
                    "  coordctl config set app/motd - < motd.txt",
                    [this] { return config_set(settings_, name_, value_, flag_, revision_); });
  set->add_option("value", value_, "- = from standard input")->required();
  set->add_flag("--string", flag_, "A string, also if it looks like JSON");
  set->add_option("--if-revision", revision_, "Only if last changed there; 0 = if there is none")
      ->check(CLI::NonNegativeNumber);
  keyed("remove", "Delete a key", "  coordctl config remove app/rate",
        [this] { return config_remove(settings_, name_); });
  auto* watch = keyed("watch", "Every change of a key",
                      "  coordctl config watch app/rate\n"
                      "  coordctl config watch --prefix app --exec 'systemctl reload app'",
                      [this] { return config_watch(settings_, name_, flag_, exec_); });
  watch->add_flag("--prefix", flag_, "Of all that stands under it, too");
  watch->add_option("--exec", exec_, "For sh, once for each change; the value is its input");
  keyed("edit", "Change a value in $VISUAL or $EDITOR, unless somebody else does meanwhile",
        "  EDITOR=nano coordctl config edit app/limits",
        [this] { return config_edit(settings_, name_); });

  auto& list = add(config, "list", "The keys under a prefix, or all", "  coordctl config list app",
                   [this] { return config_list(settings_, name_); });
  list.add_option("prefix", name_, "As app for app and app/...");
  auto& out = add(config, "export", "All values as one JSON object, by key",
                  "  coordctl config export app > app.json",
                  [this] { return config_export(settings_, name_); });
  out.add_option("prefix", name_, "As app for app and app/...");
  auto& diff =
      add(config, "diff", "What import --prune would change; status 1 if there is anything",
          "  coordctl config diff app.json app", [this] { return config_diff(settings_, file_); });
  auto& in = add(config, "import", "Set what a file made by export says, where it differs",
                 "  coordctl config import --prune app.json app",
                 [this] { return config_import(settings_, file_); });
  for (auto* app : {&diff, &in}) {
    app->add_option("file", file_.file, "- = standard input")->required();
    app->add_option("prefix", file_.prefix, "What it is compared with");
  }
  in.add_flag("--prune", file_.prune, "Remove what stands under the prefix and not in the file");
}

void CommandLine::add_rest() {
  add(app_, "status", "Look at the cluster, and name what is wrong and what to do",
      "  coordctl --endpoints a:2379,b:2379,c:2379 status", [this] { return status(settings_); });
  auto& server = add(app_, "dev-server", "An etcd in memory, for development",
                     "  coordctl dev-server --listen 127.0.0.1:12379 &\n"
                     "  curl -d '{\"key\":\"Zm9v\",\"value\":\"YmFy\"}' "
                     "http://127.0.0.1:12379/v3/kv/put",
                     [this] { return dev_server(settings_, listen_); });
  server.add_option("--listen", listen_, "host:port, port 0 = any free one (127.0.0.1:2379)");
}

/// Those that need a command must have one, and the others none.
std::vector<std::string> CommandLine::take_command() {
  const auto name = chosen_->get_name();
  const bool needed = name == "lock" || name == "elect" || name == "once";
  if (needed && command_.empty()) throw Failure{kUsage, name + " needs -- and a command"};
  if (has_command_ && !needed && name != "register") {
    throw Failure{kUsage, name + " takes no command"};
  }
  return command_;
}

int CommandLine::run() {
  try {
    app_.parse(std::vector<std::string>(arguments_.rbegin(), arguments_.rend()));
  } catch (const CLI::ParseError& error) {
    return app_.exit(error) == 0 ? int{kDone} : int{kUsage};
  }
  lock_.command = once_.lock.command = service_.command = take_command();
  if (!user_.empty()) {
    const auto colon = user_.find(':');
    settings_.options.username = user_.substr(0, colon);
    if (colon != std::string::npos) settings_.options.password = user_.substr(colon + 1);
  }
  for (const auto& pair : metadata_) {
    const auto equals = pair.find('=');
    if (equals == std::string::npos) throw Failure{kUsage, "--meta " + pair + " is no name=value"};
    service_.service.metadata[pair.substr(0, equals)] = pair.substr(equals + 1);
  }
  return action_();
}

int run(const std::vector<std::string>& arguments) {
  try {
    return CommandLine(arguments).run();
  } catch (const Failure& failure) {
    say(failure.text);
    return failure.status;
  } catch (const CoordinationError& error) {
    say(error.what());
    return exit_of(error.code());
  } catch (const std::exception& error) {
    say(error.what());
    return kSystem;
  }
}

}  // namespace
}  // namespace coordctl

int main(int argc, char** argv) {
  coordctl::remember_descriptors();
  return coordctl::run({argv + 1, argv + argc});
}
