// config get, set, remove, list, watch, edit, diff, import, export.
#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <sstream>

#include "command.hpp"
#include "commands.hpp"

namespace coordctl {

namespace {

using Value = nlohmann::json;
using Values = std::map<std::string, Value>;

std::string pretty(const Value& value) {
  if (value.is_string()) return value.get<std::string>();
  return value.dump(2, ' ', false, Value::error_handler_t::replace);
}

std::string compact(const Value& value) {
  return value.dump(-1, ' ', false, Value::error_handler_t::replace);
}

/// JSON if it is some, else a string.
Value from_text(const std::string& text, bool as_string) {
  if (as_string) return text;
  auto value = Value::parse(text, nullptr, false);
  return value.is_discarded() ? Value(text) : value;
}

std::string read_all(const std::string& file) {
  if (file == "-") return {std::istreambuf_iterator<char>(std::cin), {}};
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw Failure{kSystem, "cannot read " + file};
  return {std::istreambuf_iterator<char>(stream), {}};
}

void show_revision(const Settings& settings, const std::string& key, std::int64_t revision) {
  if (settings.json) print(Json{{"key", key}, {"revision", revision}});
}

/// A temporary file that only we can read. It stays if keep() is called.
class TempFile {
 public:
  explicit TempFile(const std::string& text) {
    const char* folder = std::getenv("TMPDIR");
    path_ = std::string(folder && *folder ? folder : "/tmp") + "/coordctl-XXXXXX";
    const int fd = mkstemp(path_.data());
    if (fd < 0) throw Failure{kSystem, "cannot write " + path_};
    const bool whole = write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size());
    close(fd);
    if (!whole) throw Failure{kSystem, "cannot write " + path_};
  }
  TempFile(const TempFile&) = delete;
  TempFile& operator=(const TempFile&) = delete;
  ~TempFile() {
    if (!kept_) unlink(path_.c_str());
  }
  const std::string& path() const { return path_; }
  const std::string& keep() { return kept_ = true, path_; }

 private:
  std::string path_;
  bool kept_{false};
};

struct End {
  int status;  // of the command
  int signal;  // that has come meanwhile and ends programs; 0 = none
};

/// Runs a command to its end.
End run_to_end(Inbox& inbox, const std::vector<std::string>& argv, const Signals& signals,
               const CommandOptions& options) {
  Command command(argv, signals, options);
  int ended_by = 0;
  while (true) {
    if (const auto status = command.reap()) return {*status, ended_by};
    const auto event = inbox.wait();
    if (!event || event->signal == SIGCHLD) continue;
    command.signal(event->signal);
    if (Signals::ends(event->signal)) ended_by = event->signal;
  }
}

}  // namespace

int config_get(const Settings& settings, const std::string& key) {
  auto c = connect(settings);
  const auto entry = c.config().get_entry(key).value();
  if (settings.json) {
    print(Json{{"key", entry.key}, {"value", Json(entry.value)}, {"revision", entry.revision}});
  } else {
    std::printf("%s\n", pretty(entry.value).c_str());
  }
  return kDone;
}

int config_set(const Settings& settings, const std::string& key, const std::string& text,
               bool as_string, std::int64_t expected) {
  const auto value = from_text(text == "-" ? read_all("-") : text, as_string);
  auto c = connect(settings);
  const auto revision = expected < 0 ? c.config().set(key, value).value()
                                     : c.config().compare_and_set(key, expected, value).value();
  show_revision(settings, key, revision);
  return kDone;
}

int config_remove(const Settings& settings, const std::string& key) {
  auto c = connect(settings);
  show_revision(settings, key, c.config().remove(key).value());
  return kDone;
}

int config_list(const Settings& settings, const std::string& prefix) {
  auto c = connect(settings);
  const auto keys = c.config().list(prefix).value();
  if (settings.json) print(Json(keys));
  if (settings.json) return kDone;
  for (const auto& key : keys) std::printf("%s\n", printable(key).c_str());
  return kDone;
}

namespace {

/// `command` once for each event: of what happened in its environment, the value on its input.
void run_for(Inbox& inbox, const Signals& signals, const ConfigEvent& event,
             const std::string& command) {
  const TempFile file(event.type == EventType::Put ? pretty(event.value) + "\n" : "");
  CommandOptions options;
  options.input = open(file.path().c_str(), O_RDONLY | O_CLOEXEC);
  options.foreground = false;
  options.environment = {{"COORDINATION_CONFIG_TYPE", to_string(event.type)},
                         {"COORDINATION_CONFIG_KEY", event.key},
                         {"COORDINATION_CONFIG_REVISION", std::to_string(event.revision)}};
  const auto end = run_to_end(inbox, shell(command), signals, options);
  close(options.input);
  if (end.status != 0) say("the command has ended with " + std::to_string(end.status));
  if (end.signal != 0) throw ended_by(end.signal);
}

void show(const Settings& settings, const ConfigEvent& event) {
  if (settings.json) {
    print(Json{{"type", to_string(event.type)},
               {"key", event.key},
               {"value", Json(event.value)},
               {"revision", event.revision}});
    return;
  }
  Table line({"TYPE", "KEY", "VALUE"}, Table::Headings::Never);
  line.add({to_string(event.type), printable(event.key),
            event.type == EventType::Put ? compact(event.value) : ""});
  line.print();
}

}  // namespace

int config_watch(const Settings& settings, const std::string& key, bool prefix,
                 const std::string& exec) {
  if (exec.empty()) {
    auto c = connect(settings);
    auto events = (prefix ? c.config().watch_prefix(key) : c.config().watch(key)).value();
    while (true) show(settings, events.next().value());
  }
  Inbox inbox;
  Signals signals(inbox);
  auto c = connect(settings);
  auto events = (prefix ? c.config().watch_prefix(key) : c.config().watch(key)).value();
  while (true) {
    const auto event =
        await(inbox, Context(), [&](Context ctx) { return events.next(std::move(ctx)); }).value();
    run_for(inbox, signals, event, exec);
  }
}

namespace {

std::string editor() {
  for (const char* name : {"VISUAL", "EDITOR"}) {
    const char* value = std::getenv(name);
    if (value && *value) return value;
  }
  return "vi";
}

struct Edit {
  Value value;
  std::int64_t revision;
};

/// What stands there, or nothing at revision 0.
Edit before_edit(Coordinator& c, const std::string& key) {
  const auto entry = c.config().get_entry(key);
  if (entry) return {entry->value, entry->revision};
  if (entry.error().code == ErrorCode::NotFound) return {"", 0};
  throw CoordinationError(entry.error());
}

void run_editor(const std::string& path) {
  Inbox inbox;
  Signals signals(inbox);
  const auto command = editor() + " \"$COORDCTL_FILE\"";
  CommandOptions options;
  options.environment = {{"COORDCTL_FILE", path}};
  const int status = run_to_end(inbox, shell(command), signals, options).status;
  if (status != 0) throw Failure{kSystem, "the editor has ended with " + std::to_string(status)};
}

}  // namespace

int config_edit(const Settings& settings, const std::string& key) {
  const auto before = [&] {
    auto c = connect(settings);
    return before_edit(c, key);
  }();
  const bool is_text = before.value.is_string();
  TempFile file(pretty(before.value) + "\n");
  run_editor(file.path());
  auto text = read_all(file.path());
  if (!text.empty() && text.back() == '\n') text.pop_back();
  if (text == pretty(before.value)) return say("nothing was changed"), int{kDone};
  // A string stays one, even if it looks like a number by now; a new key takes what it is given.
  const auto value = from_text(text, is_text && before.revision != 0);
  if (!is_text && value.is_string() && Value::parse(text, nullptr, false).is_discarded()) {
    throw Failure{kBadData, "this is no JSON; your text is in " + file.keep()};
  }
  auto c = connect(settings);
  const auto done = c.config().compare_and_set(key, before.revision, value);
  if (!done) {
    throw Failure{exit_of(done.error().code),
                  to_string(done.error()) + "; your text is in " + file.keep()};
  }
  show_revision(settings, key, *done);
  return kDone;
}

namespace {

Values stored(Coordinator& c, const std::string& prefix) {
  Values values;
  for (const auto& key : c.config().list(prefix).value()) {
    auto value = c.config().get(key);
    if (value) values[key] = std::move(*value);
    if (!value && value.error().code != ErrorCode::NotFound) value.value();
  }
  return values;
}

Values in_file(const std::string& file) {
  const auto json = Value::parse(read_all(file), nullptr, false);
  if (!json.is_object()) throw Failure{kBadData, file + " is no JSON object of keys and values"};
  return json.get<Values>();
}

struct Change {
  std::string key;
  const Value* before;  // null: was not there
  const Value* after;   // null: will not be there
};

/// What makes `before` into `after`, by key.
std::vector<Change> changes(const Values& before, const Values& after, bool prune) {
  std::vector<Change> result;
  for (const auto& [key, value] : after) {
    const auto old = before.find(key);
    if (old == before.end()) result.push_back({key, nullptr, &value});
    if (old != before.end() && old->second != value) result.push_back({key, &old->second, &value});
  }
  for (const auto& [key, value] : before) {
    if (prune && after.count(key) == 0) result.push_back({key, &value, nullptr});
  }
  return result;
}

void show(const Change& change) {
  const auto line = [&](const char* sign, const Value* value, Colour colour) {
    if (!value) return;
    const auto text = sign + printable(change.key) + "\t" + compact(*value);
    std::printf("%s\n", coloured(text, colour).c_str());
  };
  line("-", change.before, Colour::Red);
  line("+", change.after, Colour::Green);
}

Json to_json(const std::vector<Change>& list) {
  auto json = Json::array();
  for (const auto& [key, before, after] : list) {
    json.push_back({{"key", key},
                    {"before", before ? Json(*before) : Json()},
                    {"after", after ? Json(*after) : Json()}});
  }
  return json;
}

}  // namespace

int config_diff(const Settings& settings, const FileArguments& arguments) {
  const auto after = in_file(arguments.file);
  auto c = connect(settings);
  const auto before = stored(c, arguments.prefix);
  const auto list = changes(before, after, true);
  if (settings.json) {
    print(to_json(list));
  } else {
    for (const auto& change : list) show(change);
  }
  return list.empty() ? int{kDone} : int{kDifferent};
}

int config_import(const Settings& settings, const FileArguments& arguments) {
  const auto after = in_file(arguments.file);
  auto c = connect(settings);
  const auto before = stored(c, arguments.prefix);
  const auto list = changes(before, after, arguments.prune);
  for (const auto& [key, was, becomes] : list) {
    if (becomes) {
      c.config().set(key, *becomes).value();
    } else {
      const auto gone = c.config().remove(key);
      if (!gone && gone.error().code != ErrorCode::NotFound) gone.value();
    }
  }
  if (settings.json) print(to_json(list));
  say(std::to_string(list.size()) + " of " + std::to_string(after.size()) + " keys were changed");
  return kDone;
}

int config_export(const Settings& settings, const std::string& prefix) {
  auto c = connect(settings);
  const Value all = stored(c, prefix);
  std::printf("%s\n", all.is_null() ? "{}" : pretty(all).c_str());
  return kDone;
}

}  // namespace coordctl
