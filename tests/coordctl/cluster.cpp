// coordctl status and dev-server.
#include <nlohmann/json.hpp>

#include "coordctl.hpp"
#include "support/local_server.hpp"
#include "support/tls_files.hpp"

using namespace coordination;
using namespace support;
using nlohmann::json;

namespace {

struct Diagnosis {
  int exit_code{-1};
  std::string text;
  json whole;

  /// Whether a finding of this severity names the problem and the remedy.
  bool finds(const std::string& severity, const std::string& problem,
             const std::string& remedy) const {
    for (const auto& finding : whole.at("findings")) {
      if (finding.at("severity") == severity &&
          finding.at("problem").get<std::string>().find(problem) != std::string::npos &&
          finding.at("remedy").get<std::string>().find(remedy) != std::string::npos) {
        return true;
      }
    }
    return false;
  }
};

void check_finds(const Diagnosis& diagnosis, const std::string& severity,
                 const std::string& problem, const std::string& remedy) {
  INFO(diagnosis.text);
  CHECK_MESSAGE(diagnosis.finds(severity, problem, remedy), problem << " -> " << remedy);
}

Diagnosis diagnose(const std::string& url, std::vector<std::string> options = {}) {
  options.insert(options.end(), {"--json", "--command-timeout", "10s", "status"});
  const auto run = Coordctl(url).run(options);
  Diagnosis diagnosis;
  diagnosis.exit_code = run.exit_code;
  diagnosis.text = run.out;
  diagnosis.whole = json::parse(run.out, nullptr, false);
  REQUIRE_MESSAGE(diagnosis.whole.is_object(), run.out);
  return diagnosis;
}

}  // namespace

TEST_CASE("coordctl status: a healthy member") {
  const EtcdServer server;
  const auto all = diagnose(server.url());
  INFO(all.text);
  CHECK(all.exit_code == 0);
  CHECK(all.whole.at("findings").empty());
  const auto& member = all.whole.at("members").at(0);
  CHECK(member.at("answers") == true);
  CHECK(member.at("name") == "test");
  CHECK(member.at("role") == "leader");
  CHECK(member.at("version").get<std::string>().find("3.") == 0);
  CHECK(Coordctl(server).out({"status"}).find("all is well") != std::string::npos);
}

TEST_CASE("coordctl status: one of two endpoints is not there") {
  const EtcdServer server;
  const auto nobody = "http://127.0.0.1:" + std::to_string(closed_port());
  const auto all = diagnose(server.url() + "," + nobody);
  INFO(all.text);
  CHECK(all.exit_code == kUnavailable);
  CHECK(all.whole.at("members").at(0).at("answers") == true);
  CHECK(all.whole.at("members").at(1).at("answers") == false);
  check_finds(all, "error", "refused", "is etcd running");
}

TEST_CASE("coordctl status: no gateway, and what is no etcd") {
  EtcdOptions options;
  options.flags = {"--enable-grpc-gateway=false"};
  const EtcdServer server(options);
  check_finds(diagnose(server.url()), "error", "gateway is off", "--enable-grpc-gateway=true");
  const LocalServer web(LocalServer::http("200 OK", "text/html", "<html>hello</html>"));
  const auto all = diagnose("http://" + web.endpoint());
  CHECK(all.exit_code != 0);
  CHECK(all.whole.at("findings").size() == 1);
}

TEST_CASE("coordctl status: http and https mixed up, and a CA that is missing") {
  const TlsFiles files;
  EtcdOptions options;
  options.scheme = "https";
  options.flags = {"--cert-file=" + files.file("server.pem"),
                   "--key-file=" + files.file("server.key")};
  const EtcdServer tls(options);
  const auto healthy = diagnose(tls.url(), {"--cacert", files.ca()});
  INFO(healthy.text);
  CHECK(healthy.exit_code == 0);
  // It is good for two days.
  check_finds(healthy, "warning", "certificate runs out in ", "renew");
  check_finds(diagnose("http://" + tls.endpoint()), "error", "https port", "write https://");
  check_finds(diagnose(tls.url(), {"--cacert", files.other_ca()}), "error", "", "--cacert");
  const EtcdServer plain;
  const auto wrong = diagnose("https://" + plain.endpoint());
  INFO(wrong.text);
  check_finds(wrong, "error", "", "write http://");
}

TEST_CASE("coordctl status: login") {
  const EtcdServer server;
  check_finds(diagnose(server.url(), {"--user", "root:x"}), "warning", "authentication is off",
              "--user");
  REQUIRE(enable_auth(server, "app", "pw", "/"));
  check_finds(diagnose(server.url()), "error", "", "--user");
  const auto wrong = diagnose(server.url(), {"--user", "root:wrong"});
  CHECK(wrong.exit_code == kUnavailable);
  check_finds(wrong, "error", "", "the user or the password is wrong");
  const auto right = diagnose(server.url(), {"--user", "root:root-password"});
  INFO(right.text);
  CHECK(right.exit_code == 0);
}

TEST_CASE("coordctl status: a store that is full") {
  const EtcdServer server(EtcdOptions{"", {"--quota-backend-bytes=200000"}});
  auto c = connect(server);
  const std::string big(100000, 'x');
  REQUIRE(wait_until(
      [&] {
        const auto put = c.client().put("/big", big);
        return !put && put.error().cause.find("space exceeded") != std::string::npos;
      },
      lenient(30s)));
  const auto full = diagnose(server.url());
  INFO(full.text);
  CHECK(full.exit_code == kUnavailable);
  check_finds(full, "error", "NOSPACE", "etcdctl defrag");
}

TEST_CASE("coordctl dev-server: an etcd for Coordinators, and for HTTP by hand") {
  Process process({COORDCTL, "dev-server", "--listen", "127.0.0.1:0"}, with_env({}));
  const auto line = process.read_until("an etcd in memory listens on ", lenient(10s));
  REQUIRE(line.has_value());
  const auto url = line->substr(0, line->find(';'));
  CoordinatorOptions options;
  options.endpoints = {url};
  auto a = connect(options), b = connect(options);
  auto lock = a.lock().acquire("x", 10s).value();
  CHECK(b.lock().try_acquire("x", 10s).error().code == ErrorCode::Conflict);
  auto watch = b.config().watch("k").value();
  a.config().set("k", 7).value();
  CHECK(watch.next(Context::with_timeout(lenient(5s))).value().value == 7);
  const Coordctl ctl(url);
  CHECK(ctl.run({"who", "x"}).exit_code == 0);
  CHECK(ctl.run({"config", "get", "k"}).out == "7\n");
  if (!find_program("curl").empty()) {
    const auto put =
        run({"curl", "-s", "-d", R"({"key":"Zm9v","value":"YmFy"})", url + "/v3/kv/put"});
    CHECK(json::parse(put.out).contains("header"));
    const auto get = run({"curl", "-s", "-d", R"({"key":"Zm9v"})", url + "/v3/kv/range"});
    CHECK(json::parse(get.out).at("kvs").at(0).at("value") == "YmFy");
    CHECK(json::parse(run({"curl", "-s", url + "/health"}).out).at("health") == "true");
  }
  // A second one on the same port is refused, and says so.
  const auto second = run({COORDCTL, "dev-server", "--listen", url.substr(7)}, with_env({}));
  CHECK(second.exit_code == 71);
  CHECK(second.out.find("cannot listen") != std::string::npos);
  CHECK(process.terminate(lenient(5s)) == 0);
}
