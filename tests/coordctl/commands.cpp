// coordctl's other commands: elect, leader, once, who, service, config, and what is said of all.
#include <nlohmann/json.hpp>

#include "coordctl.hpp"

using namespace coordination;
using namespace support;
using nlohmann::json;

namespace {

const std::vector<std::string> kSleeper{
    "sh", "-c", "trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done"};

std::vector<std::string> with_command(std::vector<std::string> args,
                                      const std::vector<std::string>& run = kSleeper) {
  args.emplace_back("--");
  args.insert(args.end(), run.begin(), run.end());
  return args;
}

struct Fixture {
  EtcdServer server;
  Coordctl ctl{server};
  Etcdctl etcdctl{server};

  json json_of(std::vector<std::string> args) const {
    args.insert(args.begin(), "--json");
    return json::parse(ctl.out(args), nullptr, false);
  }
};

void wait_ready(Process& process) {
  REQUIRE(process.read_until("ready", lenient(10s)).has_value());
}

}  // namespace

TEST_CASE_FIXTURE(Fixture, "coordctl elect, leader: one leads, then the other") {
  CHECK(ctl.run({"leader", "sched"}).exit_code == kNotFound);
  auto a = ctl.start(with_command({"elect", "--value", "a:1", "sched"}));
  wait_ready(a);
  CHECK(ctl.out({"leader", "sched"}) == "a:1");
  auto b = ctl.start(with_command({"elect", "--value", "b:1", "sched"}));
  auto watch = ctl.start({"--json", "leader", "--watch", "sched"});
  const auto next = [&] { return json::parse(watch.read_line(lenient(10s)).value_or("null")); };
  CHECK(next().at("leader") == "a:1");
  REQUIRE(wait_until(
      [&] {
        return json_of({"who", "--election", "sched"}).size() == 2;
      },
      lenient(10s)));
  CHECK(a.terminate() == 0);
  wait_ready(b);
  CHECK(next().at("leader") == "b:1");
  CHECK(b.terminate() == 0);
  CHECK(next().at("leader").is_null());
  auto c = ctl.start(with_command({"elect", "sched"}));
  wait_ready(c);
  const auto name = next().at("leader").get<std::string>();
  CHECK(name.find(":" + std::to_string(c.pid())) != std::string::npos);
}

TEST_CASE_FIXTURE(Fixture, "coordctl once: the first that succeeds is the only one") {
  const auto once = [&](const std::string& slot, const std::string& script) {
    return ctl.run(with_command({"once", "nightly", slot}, {"sh", "-c", script}));
  };
  const auto ran = [](const RunResult& run) {  // perhaps after a line on the wait
    return run.out.size() >= 4 && run.out.rfind("ran\n") == run.out.size() - 4;
  };
  CHECK(once("mon", "echo ran; exit 3").exit_code == 3);  // a failure is no success
  const auto first = once("mon", "echo ran");
  CHECK(first.exit_code == 0);
  CHECK(ran(first));
  const auto second = once("mon", "echo ran");
  CHECK(second.exit_code == 0);
  CHECK(second.out.find("was done already") != std::string::npos);
  CHECK_FALSE(ran(second));
  CHECK(ran(once("tue", "echo ran")));
  CHECK(etcdctl.keys("/once/nightly/").size() == 2);
  CHECK(etcdctl.keys("/locks/").empty());
}

TEST_CASE_FIXTURE(Fixture, "coordctl once: who comes while it runs waits, and does not run") {
  auto first = ctl.start(
      with_command({"once", "n", "s"},
                   {"sh", "-c", "trap 'exit 4' TERM; echo ready; while :; do sleep 0.05; done"}));
  wait_ready(first);
  auto second = ctl.start(with_command({"once", "n", "s"}, {"echo", "ran"}));
  REQUIRE(wait_until([&] { return etcdctl.keys("/locks/once/n/").size() == 2; }, lenient(10s)));
  CHECK_FALSE(second.wait(300ms).has_value());
  first.signal(SIGTERM);  // it fails, so the second runs after all
  CHECK(first.wait(lenient(10s)) == 4);
  CHECK(second.wait(lenient(10s)) == 0);
  CHECK(second.read_all(1s).find("ran") != std::string::npos);
}

TEST_CASE_FIXTURE(Fixture, "coordctl once: clocks that differ by a day do nothing twice") {
  const TempDir folder;
  const auto log = folder.file("log");
  // Three machines whose clocks are a day ahead, right, and a day late, on three days.
  for (int day = 2; day <= 4; ++day) {
    for (const int error : {1, 0, -1}) {
      const auto slot = "2031-05-0" + std::to_string(day + error);
      const auto run =
          ctl.run(with_command({"once", "n", slot}, {"sh", "-c", "echo " + slot + " >> " + log}));
      CHECK(run.exit_code == 0);
    }
  }
  CHECK(contents(log) == "2031-05-03\n2031-05-02\n2031-05-01\n2031-05-04\n2031-05-05\n");
}

TEST_CASE_FIXTURE(Fixture, "coordctl who: the holder and the queue, in order") {
  const auto nobody = ctl.run({"who", "x"});
  CHECK(nobody.exit_code == kNotFound);
  CHECK(nobody.out == "coordctl: nobody holds x, and nobody waits for it\n");
  auto a = ctl.start(with_command({"lock", "x"}));
  wait_ready(a);
  auto b = etcdctl.start({"lock", "/locks/x"});
  REQUIRE(wait_until([&] { return etcdctl.keys("/locks/x/").size() == 2; }, lenient(10s)));
  const auto queue = json_of({"who", "x"});
  REQUIRE(queue.size() == 2);
  const auto who = queue[0].at("who").get<std::string>();
  CHECK(who.find(":" + std::to_string(a.pid())) != std::string::npos);
  CHECK(queue[1].at("who") == "");  // etcdctl does not say
  CHECK(queue[0].at("token") < queue[1].at("token"));
  CHECK(queue[0].at("ttl_left") > 0);
  // Without a terminal: fields between tabs, no headings.
  const auto text = ctl.out({"who", "x"});
  CHECK(text.find("1\t" + who + "\t") == 0);
  CHECK(text.find("TOKEN") == std::string::npos);
  CHECK(text.find('\033') == std::string::npos);
}

TEST_CASE_FIXTURE(Fixture, "coordctl service: registered while the command runs") {
  auto web = ctl.start(
      with_command({"service", "register", "web", "--id", "web-1", "--address", "10.0.0.7",
                    "--port", "80", "--meta", "zone=a", "--meta", "note=x=y"}));
  wait_ready(web);
  const auto list = json_of({"service", "list", "web"});
  REQUIRE(list.size() == 1);
  CHECK(list[0].at("id") == "web-1");
  CHECK(list[0].at("port") == 80);
  CHECK(list[0].at("metadata") == json({{"zone", "a"}, {"note", "x=y"}}));
  CHECK(ctl.out({"service", "list"}) == "web\tweb-1\t10.0.0.7:80\tnote=x=y,zone=a");
  auto watch = ctl.start({"service", "watch", "web"});
  CHECK(watch.read_line(lenient(10s)) == "PUT\tweb-1\t10.0.0.7:80\tnote=x=y,zone=a");
  CHECK(web.terminate() == 0);
  CHECK(watch.read_line(lenient(10s)) == "DELETE\tweb-1\t10.0.0.7:80\tnote=x=y,zone=a");
  CHECK(ctl.run({"service", "list", "web"}).exit_code == kNotFound);
}

TEST_CASE_FIXTURE(Fixture,
                  "coordctl service: it comes and goes with its check, and a signal ends it") {
  const TempDir folder;
  const auto flag = folder.file("healthy");
  auto process = ctl.start({"service", "register", "web", "--id", "1", "--address", "a", "--port",
                            "1", "--interval", "50ms", "--check", "test -e " + flag});
  const auto there = [&](bool yes) {
    return wait_until([&] { return etcdctl.keys("/services/web/").empty() != yes; }, lenient(10s));
  };
  CHECK_FALSE(process.wait(300ms).has_value());
  CHECK(etcdctl.keys("/services/web/").empty());
  std::ofstream(flag) << "yes";
  CHECK(there(true));
  unlink(flag.c_str());
  CHECK(there(false));
  std::ofstream(flag) << "yes";
  CHECK(there(true));
  CHECK(process.terminate(lenient(10s)) == 0);
  CHECK(etcdctl.keys("/services/web/").empty());
}

TEST_CASE_FIXTURE(Fixture, "coordctl config: get, set, remove, list") {
  CHECK(ctl.run({"config", "get", "a"}).exit_code == kNotFound);
  CHECK(ctl.run({"config", "set", "a/rate", "[1,2]"}).exit_code == 0);
  CHECK(ctl.run({"config", "set", "a/text", "hello"}).exit_code == 0);
  CHECK(ctl.run({"config", "set", "--string", "a/zip", "01234"}).exit_code == 0);
  CHECK(ctl.run({"config", "set", "a/number", "-5"}).exit_code == 0);
  CHECK(json_of({"config", "get", "a/rate"}).at("value") == json({1, 2}));
  CHECK(ctl.out({"config", "get", "a/text"}) == "hello");
  CHECK(json_of({"config", "get", "a/zip"}).at("value") == "01234");
  CHECK(json_of({"config", "get", "a/number"}).at("value") == -5);
  CHECK(ctl.out({"config", "list", "a"}) == "a/number\na/rate\na/text\na/zip");
  CHECK(etcdctl.get("/config/a/text") == "hello");
  const auto revision = json_of({"config", "get", "a/text"}).at("revision").dump();
  CHECK(ctl.run({"config", "set", "--if-revision", revision, "a/text", "two"}).exit_code == 0);
  CHECK(ctl.run({"config", "set", "--if-revision", revision, "a/text", "3"}).exit_code == kHeld);
  CHECK(ctl.run({"config", "set", "--if-revision", "0", "a/text", "3"}).exit_code == kHeld);
  CHECK(ctl.run({"config", "set", "--if-revision", "0", "a/new", "3"}).exit_code == 0);
  CHECK(ctl.out({"config", "get", "a/text"}) == "two");
  CHECK(ctl.run({"config", "remove", "a/text"}).exit_code == 0);
  CHECK(ctl.run({"config", "remove", "a/text"}).exit_code == kNotFound);
  CHECK(ctl.run({"config", "set", "../x", "1"}).exit_code == kBadData);
}

TEST_CASE_FIXTURE(Fixture, "coordctl config edit: by compare-and-set, and no text is lost") {
  const auto edit = [&](const std::string& key, const std::string& script) {
    const TempDir folder;
    const auto editor = folder.file("editor");
    std::ofstream(editor) << "#!/bin/sh\n" << script << "\n";
    chmod(editor.c_str(), 0700);
    return ctl.run({"config", "edit", key}, {"EDITOR=" + editor, "VISUAL="});
  };
  REQUIRE(ctl.run({"config", "set", "limits", R"({"rate":100})"}).ok());
  CHECK(edit("limits", "sed -i s/100/200/ \"$1\"").exit_code == 0);
  CHECK(json_of({"config", "get", "limits"}).at("value") == json({{"rate", 200}}));

  const auto same = edit("limits", "true");
  CHECK(same.exit_code == 0);
  CHECK(same.out.find("nothing was changed") != std::string::npos);

  const auto broken = edit("limits", "echo '{' > \"$1\"");
  CHECK(broken.exit_code == kBadData);
  const auto kept = broken.out.rfind("is in ");
  REQUIRE(kept != std::string::npos);
  const auto path = broken.out.substr(kept + 6, broken.out.find('\n', kept) - kept - 6);
  CHECK(contents(path) == "{\n");
  unlink(path.c_str());
  CHECK(json_of({"config", "get", "limits"}).at("value") == json({{"rate", 200}}));

  const auto beaten = edit("limits", std::string(COORDCTL) + " --endpoints " + server.url() +
                                         " config set limits 5; echo 6 > \"$1\"");
  CHECK(beaten.exit_code == kHeld);
  CHECK(ctl.out({"config", "get", "limits"}) == "5");

  CHECK(edit("new", "echo '[1]' > \"$1\"").exit_code == 0);
  CHECK(json_of({"config", "get", "new"}).at("value") == json({1}));
  REQUIRE(ctl.run({"config", "set", "--string", "zip", "01234"}).ok());
  CHECK(edit("zip", "echo 12345 > \"$1\"").exit_code == 0);
  CHECK(json_of({"config", "get", "zip"}).at("value") == "12345");  // a string stays one
  CHECK(edit("zip", "exit 1").exit_code == 71);
}

TEST_CASE_FIXTURE(Fixture, "coordctl config: export, diff, import") {
  const TempDir folder;
  const auto file = folder.file("app.json");
  CHECK(ctl.out({"config", "export"}) == "{}");
  REQUIRE(ctl.run({"config", "set", "app/a", "1"}).ok());
  REQUIRE(ctl.run({"config", "set", "app/b", R"("x")"}).ok());
  REQUIRE(ctl.run({"config", "set", "other", "1"}).ok());
  std::ofstream(file) << ctl.out({"config", "export", "app"});
  CHECK(json::parse(contents(file)) == json({{"app/a", 1}, {"app/b", "x"}}));
  CHECK(ctl.run({"config", "diff", file, "app"}).exit_code == 0);
  REQUIRE(ctl.run({"config", "set", "app/a", "2"}).ok());
  REQUIRE(ctl.run({"config", "set", "app/c", "3"}).ok());
  const auto diff = ctl.run({"config", "diff", file, "app"});
  CHECK(diff.exit_code == kDifferent);
  CHECK(diff.out == "-app/a\t2\n+app/a\t1\n-app/c\t3\n");
  CHECK(ctl.run({"config", "import", file, "app"}).exit_code == 0);
  CHECK(ctl.out({"config", "get", "app/a"}) == "1");
  CHECK(ctl.out({"config", "list", "app"}) == "app/a\napp/b\napp/c");
  CHECK(ctl.run({"config", "import", "--prune", file, "app"}).exit_code == 0);
  CHECK(ctl.out({"config", "list", "app"}) == "app/a\napp/b");
  CHECK(ctl.out({"config", "get", "other"}) == "1");
  std::ofstream(file) << "[1]";
  CHECK(ctl.run({"config", "import", file}).exit_code == kBadData);
}

TEST_CASE_FIXTURE(Fixture, "coordctl config watch: events, and a command for each") {
  const TempDir folder;
  const auto file = folder.file("log");
  auto watch =
      ctl.start({"--verbose", "config", "watch", "--prefix", "app", "--exec",
                 "echo $COORDINATION_CONFIG_TYPE $COORDINATION_CONFIG_KEY $(cat) >> " + file});
  auto lines = ctl.start({"config", "watch", "app/a"});
  // Neither says when it has begun: so the first events are sent until both have seen one.
  bool begun = false;
  REQUIRE(wait_until(
      [&] {
        REQUIRE(etcdctl.put("/config/app/a", "0"));
        begun = begun || lines.read_line(20ms).has_value();
        return begun && !contents(file).empty();
      },
      lenient(20s)));
  REQUIRE(etcdctl.put("/config/app/b/c", "{\"x\": 1}"));
  REQUIRE(etcdctl.put("/config/app/a", "last"));
  REQUIRE(etcdctl.run({"del", "/config/app/a"}).ok());
  const std::string end = "PUT app/b/c { \"x\": 1 }\nPUT app/a last\nDELETE app/a\n";
  CHECK(wait_until([&] { return contents(file).find(end) != std::string::npos; }, lenient(10s)));
  REQUIRE(lines.read_until("PUT\tapp/a\t\"last\"", lenient(10s)).has_value());
  CHECK(lines.read_line(lenient(10s)) == "DELETE\tapp/a\t");
  watch.signal(SIGTERM);
  CHECK(watch.wait(lenient(5s)) == 128 + SIGTERM);
}

TEST_CASE_FIXTURE(Fixture, "coordctl config watch: a signal while its command runs ends both") {
  const TempDir folder;
  const auto file = folder.file("log");
  auto watch = ctl.start({"config", "watch", "app/a", "--exec",
                          "trap 'echo told >> " + file + "; exit 3' TERM; echo begun >> " + file +
                              "; while :; do sleep 0.05; done"});
  REQUIRE(wait_until(
      [&] {
        REQUIRE(etcdctl.put("/config/app/a", "0"));
        return !contents(file).empty();
      },
      lenient(20s)));
  watch.signal(SIGTERM);
  CHECK(watch.wait(lenient(10s)) == 128 + SIGTERM);
  CHECK(contents(file) == "begun\ntold\n");
}

TEST_CASE_FIXTURE(Fixture, "coordctl: the environment, and options before it") {
  const std::vector<std::string> env{"ETCDCTL_ENDPOINTS=" + server.url(),
                                     "COORDINATION_KEY_PREFIX=/shop"};
  CHECK(run({COORDCTL, "config", "set", "a", "1"}, with_env(env)).exit_code == 0);
  CHECK(etcdctl.get("/shop/config/a") == "1");
  CHECK(run({COORDCTL, "config", "set", "a", "2", "--key-prefix", "/other"}, with_env(env)).ok());
  CHECK(etcdctl.get("/other/config/a") == "2");
  CHECK(etcdctl.get("/shop/config/a") == "1");
}

TEST_CASE("coordctl: what is typed wrong") {
  const Coordctl ctl("http://127.0.0.1:1");
  for (const auto& args :
       std::vector<std::vector<std::string>>{{},
                                             {"nothing"},
                                             {"config"},
                                             {"lock"},
                                             {"who"},
                                             {"config", "get"},
                                             {"status", "--no"},
                                             {"config", "get", "x", "--", "true"},
                                             {"service", "register", "x", "--id", "1"},
                                             {"lock", "x", "--permits", "0", "--", "true"}}) {
    CHECK(ctl.run(args).exit_code == kUsage);
  }
  const auto version = ctl.run({"--version"});
  CHECK(version.exit_code == 0);
  CHECK(version.out.find("coordctl 0.") == 0);
}

TEST_CASE("coordctl: the man page and the completion name every command and option") {
  const Coordctl ctl("http://127.0.0.1:1");
  const auto help = ctl.run({"--help-all"});
  REQUIRE(help.exit_code == 0);
  auto man = contents(std::string(SOURCE) + "/tools/coordctl/coordctl.1");
  const auto bash = contents(std::string(SOURCE) + "/tools/coordctl/coordctl.bash");
  for (std::size_t at; (at = man.find("\\-")) != std::string::npos;) man.erase(at, 1);
  std::istringstream lines(help.out);
  int options = 0;
  for (std::string line; std::getline(lines, line);) {
    const auto at = line.find_first_not_of(' ');
    const auto option = line.find("--", at == std::string::npos ? line.size() : at);
    if (option == std::string::npos || (option != at && line.compare(at, 3, "-h,") != 0)) continue;
    const auto name = line.substr(option, line.find_first_of(" ,=", option) - option);
    if (name == "--") continue;
    CHECK_MESSAGE(man.find(name) != std::string::npos, "man: " << name);
    CHECK_MESSAGE(bash.find(name) != std::string::npos, "completion: " << name);
    ++options;
  }
  CHECK(options > 30);
  for (const char* command :
       {"lock", "elect", "leader", "once", "who", "register", "list", "watch", "get", "set",
        "remove", "edit", "diff", "import", "export", "status", "dev-server"}) {
    CHECK_MESSAGE(help.out.find(command) != std::string::npos, command);
    CHECK_MESSAGE(man.find(command) != std::string::npos, command);
    CHECK_MESSAGE(bash.find(command) != std::string::npos, command);
  }
}
