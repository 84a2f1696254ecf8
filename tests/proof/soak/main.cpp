// soak: long random faults over a real cluster, and everything that the library has said meanwhile
// judged.
#include <CLI/CLI.hpp>
#include <csignal>
#include <filesystem>
#include <iomanip>
#include <iostream>
#include <regex>

#include "cluster/etcds.hpp"
#include "proof/invariants.hpp"
#include "proof/nemesis.hpp"

namespace {

using namespace proof;

struct Options {
  std::string time{"60s"};
  std::uint64_t seed{std::random_device{}()};
  std::string etcd{cluster::binaries().back()}, out{"soak-history"}, checker{};
  std::size_t workers{4};
};

const bool is_worker = support::child_main("worker", [](const support::Args& args) {
  WorkerOptions options;
  options.process = std::stoi(args.at(0));
  options.seed = std::stoull(args.at(1));
  options.journal = args.at(2);
  options.sits = args.at(3) == "sits";
  options.endpoints.assign(args.begin() + 4, args.end());
  return run_worker(options);
});

/// Has SIGINT or SIGTERM come? The second one ends this process, and the kernel its children.
volatile std::sig_atomic_t interrupted = 0;

void end_when_interrupted() {
  struct sigaction action {};
  action.sa_handler = [](int) { interrupted = 1; };
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  for (const int number : {SIGINT, SIGTERM}) sigaction(number, &action, nullptr);
}

/// "90s", "30m", "2h".
std::string why_no_duration(const std::string& text) {
  static const std::regex form("[1-9][0-9]{0,5}[smh]");
  return std::regex_match(text, form) ? "" : "'" + text + "' is no time like 90s, 30m or 2h";
}
std::chrono::seconds duration_of(const std::string& text) {
  const char unit = text.back();
  const int factor = unit == 'h' ? 3600 : unit == 'm' ? 60 : 1;
  return std::chrono::seconds(std::stoi(text) * factor);
}

support::ClusterOptions cluster_options(const Options& options) {
  support::ClusterOptions cluster;
  cluster.binary = options.etcd;
  cluster.flags = {"--bcrypt-cost=4"};
  return cluster;
}

/// The user whom all workers are.
void make_root(EtcdCluster& etcd) {
  const std::vector<std::pair<std::string, Json>> steps{
      {"/v3/auth/user/add", {{"name", "root"}, {"password", "root-password"}}},
      {"/v3/auth/role/add", {{"name", "root"}}},
      {"/v3/auth/user/grant", {{"user", "root"}, {"role", "root"}}}};
  for (const auto& [path, body] : steps) etcd.ask(0, path, body, 5s);
}

/// What was followed leads to what is there now.
Violations differences(EtcdCluster& etcd, Recorder& recorder) {
  if (!recorder.wait_for(etcd.gateway(0).revision()))
    return {"it could not be followed to its end"};
  std::map<std::string, std::string> followed, there;
  for (const auto& [key, change] : recorder.state("")) followed[key] = change.value;
  const std::string all = gateway::b64(std::string(1, '\0'));
  const auto reply = etcd.ask(0, "/v3/kv/range", {{"key", all}, {"range_end", all}}, 20s);
  for (const Json& kv : reply.json.value("kvs", Json::array())) {
    there[gateway::unb64(kv["key"])] = gateway::unb64(kv.value("value", ""));
  }
  if (followed == there) return {};
  return {"its watch says " + std::to_string(followed.size()) + " keys, range says " +
          std::to_string(there.size()) + ", or other values"};
}

/// What is left in the cluster when everybody has gone.
Violations leftovers(EtcdCluster& etcd, Recorder& recorder) {
  const auto leases = [&] {
    const auto reply = etcd.ask(0, "/v3/lease/leases", Json::object(), 5s);
    return reply.status == 200 ? reply.json.value("leases", Json::array()).size() : std::size_t{1};
  };
  Violations found;
  if (!support::wait_until([&] { return leases() == 0; }, kPatience)) {
    found.push_back(std::to_string(leases()) + " leases are left");
  }
  for (const char* folder : {"locks/", "semaphores/", "elections/", "services/"}) {
    for (const auto& [key, change] : recorder.state(std::string(kPrefix) + "/" + folder)) {
      found.push_back(key + " is left");
    }
  }
  return found;
}

/// For the checker in Go: the calls that stand for themselves.
void write_operations(const History& history, const std::string& path) {
  static const std::set<std::string> kinds{"get",     "set",  "cas",    "remove",
                                           "acquire", "held", "release"};
  std::ofstream file(path);
  for (const Entry& e : history.entries) {
    if (kinds.count(e.kind) == 0) continue;
    const char* is = e.is == Is::Done ? "done" : e.is == Is::NotApplied ? "not" : "maybe";
    const Json line{{"process", e.process}, {"kind", e.kind}, {"in", e.in},     {"out", e.out},
                    {"begin", e.begin},     {"end", e.end},   {"code", e.code}, {"is", is}};
    file << line.dump() << "\n";
  }
}

void write_store(const History& history, const std::string& path) {
  std::ofstream file(path);
  for (const Change& change : history.changes) {
    file << change.revision << (change.put ? " PUT " : " DELETE ") << change.key << " "
         << change.value << "\n";
  }
}

bool report(const char* what, const Violations& found) {
  std::cout << std::left << std::setw(52) << what
            << (found.empty() ? "holds" : "VIOLATED, " + std::to_string(found.size()) + " times")
            << "\n";
  for (std::size_t i = 0; i < std::min<std::size_t>(found.size(), 5); ++i) {
    std::cout << "    " << found[i].substr(0, 1000) << "\n";
  }
  return found.empty();
}

/// Notes take no time, and are no calls.
void print_calls(const History& history) {
  static const std::set<std::string> notes{"watch", "reached", "ended"};
  std::map<std::string, std::map<Is, int>> counts;
  int calls = 0, seen = 0;
  for (const Entry& entry : history.entries) {
    if (notes.count(entry.kind) > 0) continue;
    ++counts[entry.kind][entry.is];
    const bool by_watch = entry.kind == "event" || entry.kind == "view" || entry.kind == "missed";
    ++(by_watch ? seen : calls);
  }
  std::cout << "\n             " << std::setw(10) << "done" << std::setw(10) << "not"
            << std::setw(10) << "maybe"
            << "\n";
  for (auto& [kind, count] : counts) {
    std::cout << std::left << std::setw(13) << kind << std::right << std::setw(10)
              << count[Is::Done] << std::setw(10) << count[Is::NotApplied] << std::setw(10)
              << count[Is::MaybeApplied] << "\n";
  }
  std::cout << calls << " calls, " << seen << " events and views, " << history.changes.size()
            << " changes of the store\n\n";
}

void print_faults(const Nemesis& nemesis) {
  for (const auto& [name, count] : nemesis.counts()) {
    std::cout << std::left << std::setw(28) << name << std::right << std::setw(4) << count << "\n";
  }
}

/// True: it is linearizable, or nobody can tell.
bool check_operations(const Options& options, const std::string& path) {
  if (support::find_program(options.checker).empty()) {
    std::cout << "SKIPPED: linearizability: there is no checker (it needs Go)\n";
    return true;
  }
  const auto result = support::run({options.checker, path}, {}, 30min);
  std::cout << result.out;
  return result.ok();
}

int judge(const Options& options, const History& history, const Nemesis& nemesis,
          const std::set<int>& killed, const Violations& differences, const Violations& left) {
  print_faults(nemesis);
  print_calls(history);
  int bad = 0;
  bad += !report("every write is as it was told", writes_are_as_told(history));
  bad += !report("every removal is as it was told", removals_are_as_told(history));
  bad += !report("every registration is as it was told",
                 registrations_are_as_told(history, std::string(kPrefix) + "/services/svc/"));
  bad += !report("guarded writes are their owner's", guarded_writes_are_owners(history, kPermits));
  bad += !report("holders are alone, or within the permits", holders_are_alone(history, kPermits));
  bad += !report("tokens grow", tokens_grow(history));
  bad += !report("who was robbed is told", robbed_is_told(history, nemesis.robbed()));
  bad += !report("watches are the store's history", watches_are_complete(history));
  bad += !report("views are the store at their revision", views_are_true(history));
  bad += !report("everything ends", everything_ends(history, killed));
  bad += !report("nothing is left", left);
  bad += !report("etcd's range is what its watch has led to", differences);
  const auto path = options.out + "/operations.jsonl";
  write_operations(history, path);
  write_store(history, options.out + "/store.txt");
  bad += !check_operations(options, path);
  std::cout << (bad == 0 ? "all of it holds" : "VIOLATED") << ", seed " << options.seed
            << (interrupted ? ", interrupted" : "") << ", histories in " << options.out << "\n";
  return bad == 0 ? 0 : 1;
}

/// Without what proves nothing.
std::vector<Entry> evidence(std::vector<Entry> entries, const Nemesis& nemesis) {
  const auto proves_nothing = [&](const Entry& entry) {
    return entry.kind == "held" &&
           std::any_of(nemesis.blind().begin(), nemesis.blind().end(), [&](const auto& blind) {
             return entry.end >= blind.first && entry.begin <= blind.second;
           });
  };
  entries.erase(std::remove_if(entries.begin(), entries.end(), proves_nothing), entries.end());
  return entries;
}

/// Empty but for what is none of ours.
void make_folder(const std::string& path) {
  std::filesystem::create_directories(path);
  for (const auto& file : std::filesystem::directory_iterator(path)) {
    const auto type = file.path().extension();
    if (type == ".jsonl" || type == ".txt" || type == ".log") std::filesystem::remove(file);
  }
}

int soak(const Options& options) {
  make_folder(options.out);
  EtcdCluster etcd(cluster_options(options));
  etcd.reserve();  // for a fourth member that comes and goes
  make_root(etcd);
  Recorder recorder(etcd);
  Workers workers(etcd, options.workers, options.seed, options.out);
  const auto end = std::chrono::steady_clock::now() + duration_of(options.time);
  Nemesis nemesis(etcd, workers, recorder, options.seed,
                  [end] { return interrupted || std::chrono::steady_clock::now() >= end; });
  nemesis.run();
  nemesis.recover();
  workers.end();
  const auto left = leftovers(etcd, recorder), differ = differences(etcd, recorder);
  const History history{evidence(workers.entries(), nemesis), recorder.changes()};
  return judge(options, history, nemesis, workers.killed(), differ, left);
}

}  // namespace

int main(int argc, char** argv) {
  if (const auto done = support::before_tests(argc, argv)) return *done;
  Options options;
  CLI::App app("Random faults over a real cluster, and a verdict on what was said meanwhile");
  app.add_option("--time", options.time, "how long: 90s, 30m, 2h")
      ->check(why_no_duration)
      ->capture_default_str();
  app.add_option("--seed", options.seed, "of the faults and of the workers' dice")
      ->capture_default_str();
  app.add_option("--etcd", options.etcd, "path of the etcd")->capture_default_str();
  app.add_option("--workers", options.workers, "how many processes")
      ->check(CLI::Range(2, 64))
      ->capture_default_str();
  app.add_option("--out", options.out, "folder for the histories")->capture_default_str();
  app.add_option("--checker", options.checker, "the program in tests/proof/checker");
  CLI11_PARSE(app, argc, argv);
  if (support::find_program(options.etcd).empty()) {
    std::cerr << (options.etcd.empty() ? "there is no etcd; name one by --etcd PATH"
                                       : options.etcd + " cannot be run")
              << "\n";
    return 2;
  }
  end_when_interrupted();
  std::cout << "seed " << options.seed << ", " << options.time << ", "
            << "etcd " << cluster::version_of(options.etcd) << std::endl;
  return soak(options);
}
