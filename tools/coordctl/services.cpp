// service register, list, watch.
#include <algorithm>
#include <memory>
#include <set>

#include "command.hpp"
#include "commands.hpp"

namespace coordctl {

namespace {

/// A registration that lasts as long as its check succeeds, the command runs and no signal ends it.
class Registrar {
 public:
  Registrar(Inbox& inbox, const Signals& signals, Coordinator& c, const ServiceArguments& arguments)
      : inbox_(inbox), signals_(signals), c_(c), arguments_(arguments) {}

  int run() {
    if (arguments_.check.empty()) enter(c_.registry().register_scoped(arguments_.service));
    if (!arguments_.command.empty()) start_command();
    while (!status_) {
      if (!arguments_.check.empty()) look_after_check();
      const auto event = inbox_.wait(next_);
      if (event && event->kind == Event::Kind::Signal) take(event->signal);
    }
    return *status_;
  }

 private:
  void start_command() {
    CommandOptions options;
    options.grace = arguments_.grace;
    command_ = std::make_unique<Command>(arguments_.command, signals_, options);
  }

  void take(int signal) {
    if (signal == SIGCHLD) {
      if (command_) status_ = command_->reap();
    } else if (command_) {
      command_->signal(signal);
    } else if (Signals::ends(signal)) {
      status_ = kDone;
    }
  }

  /// `next_`: when the check begins, or has had too much time.
  void look_after_check() {
    const auto now = steady_clock::now();
    if (!check_ && now >= next_) {
      CommandOptions options;
      options.foreground = false;
      check_ = std::make_unique<Command>(shell(arguments_.check), signals_, options);
      next_ = now + arguments_.interval;
    }
    const auto ended = check_ ? check_->reap() : std::nullopt;
    if (check_ && (ended || now >= next_)) {
      check_.reset();  // kills it if it has not ended
      next_ = now + arguments_.interval;
      apply(ended == 0);
    }
  }

  void apply(bool healthy) {
    if (healthy && !registration_) {
      enter(c_.registry().register_scoped(arguments_.service));
    } else if (!healthy && registration_) {
      say("the check has failed: " + arguments_.service.id + " is taken out");
      registration_.reset();
    }
  }

  void enter(Result<Registration> made) {
    if (made) {
      registration_ = std::make_unique<Registration>(std::move(*made));
    } else if (arguments_.check.empty()) {
      throw CoordinationError(made.error());
    } else {
      say(to_string(made.error()) + "; it is tried again after the next check");
    }
  }

  Inbox& inbox_;
  const Signals& signals_;
  Coordinator& c_;
  const ServiceArguments& arguments_;
  std::unique_ptr<Command> command_, check_;
  std::unique_ptr<Registration> registration_;
  std::optional<steady_clock::time_point> next_{
      arguments_.check.empty() ? std::nullopt : std::optional(steady_clock::now())};
  std::optional<int> status_;
};

Json to_json(const ServiceInfo& service) {
  return {{"name", service.name},         {"id", service.id},
          {"address", service.address},   {"port", service.port},
          {"metadata", service.metadata}, {"ttl_seconds", service.ttl.count() / 1000}};
}

std::string metadata_text(const ServiceInfo& service) {
  std::string text;
  for (const auto& [name, value] : service.metadata) {
    text += (text.empty() ? "" : ",") + name + "=" + value;
  }
  return printable(text);
}

std::string place(const ServiceInfo& service) {
  return printable(service.address) + ":" + std::to_string(service.port);
}

/// The names of all services: the segment after the folder.
std::set<std::string> names(Coordinator& c, const Settings& settings) {
  RangeRequest request{settings.options.key_prefix + "/services/"};
  request.range_end = prefix_range_end(request.key);
  request.keys_only = true;
  std::set<std::string> found;
  for (const auto& kv : c.client().range(request).value().kvs) {
    const auto rest = kv.key.substr(request.key.size());
    if (rest.find('/') != std::string::npos) found.insert(rest.substr(0, rest.find('/')));
  }
  return found;
}

}  // namespace

int service_register(const Settings& settings, const ServiceArguments& arguments) {
  Inbox inbox;
  Signals signals(inbox);
  auto c = await(inbox, Context(), [&](Context ctx) {
             return Coordinator::connect(with_logger(settings), std::move(ctx));
           }).value();
  return Registrar(inbox, signals, c, arguments).run();
}

int service_list(const Settings& settings, const std::string& name) {
  auto c = connect(settings);
  const auto wanted = name.empty() ? names(c, settings) : std::set<std::string>{name};
  Table table({"SERVICE", "ID", "ADDRESS", "METADATA"});
  auto json = Json::array();
  for (const auto& one : wanted) {
    for (const auto& service : c.registry().discover(one).value()) {
      table.add(
          {printable(service.name), printable(service.id), place(service), metadata_text(service)});
      json.push_back(to_json(service));
    }
  }
  if (settings.json) {
    print(json);
  } else {
    table.print();
  }
  return json.empty() && !name.empty() ? int{kNotFound} : int{kDone};
}

int service_watch(const Settings& settings, const std::string& name) {
  auto c = connect(settings);
  auto events = c.registry().watch(name, WatchOptions{true}).value();
  while (true) {
    const auto event = events.next().value();
    if (settings.json) {
      print(Json{{"type", to_string(event.type)},
                 {"service", to_json(event.service)},
                 {"revision", event.revision}});
    } else {
      Table line({"TYPE", "ID", "ADDRESS", "METADATA"}, Table::Headings::Never);
      line.add({to_string(event.type), printable(event.service.id), place(event.service),
                metadata_text(event.service)});
      line.print();
    }
  }
}

}  // namespace coordctl
