// status: looks at every member and names what is wrong, and what to do about it.
#include <algorithm>
#include <ctime>
#include <set>

#include "commands.hpp"

#ifdef CPPHTTPLIB_OPENSSL_SUPPORT
#include <openssl/bio.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#endif

namespace coordctl {

namespace {

using Answer = nlohmann::json;

constexpr milliseconds kPatience(3000);
constexpr milliseconds kSlow(300);

struct Finding {
  bool is_error;  // else a warning
  std::string where, problem, remedy;
};

/// What one endpoint says of itself.
struct Look {
  std::string endpoint;
  bool answers{false};
  milliseconds latency{0};
  Answer status{};  // of /v3/maintenance/status; null if it needs a login
};

/// What an error's text shows, and what is to be done then.
struct Symptom {
  const char* text;
  const char* remedy;
};

constexpr Symptom kSymptoms[] = {
    {"an https port", "write https:// before the endpoint, and give --cacert"},
    {"gateway is off",
     "start etcd with --enable-grpc-gateway=true; or this is no etcd: is it the "
     "client port (2379), and no proxy that lets only gRPC through?"},
    {"is it an http port", "this port speaks plain http: write http:// before the endpoint"},
    {"has expired", "renew the certificate; or the clock of this machine is wrong"},
    {"not yet valid", "the clock of this machine is behind, or that of the CA was ahead"},
    {"unknown CA", "give the CA that has signed etcd's certificate: --cacert"},
    {"demands a client certificate", "etcd wants a client certificate: --cert and --key"},
    {"refused the client certificate",
     "etcd does not accept the client certificate: is it of etcd's "
     "--trusted-ca-file?"},
    {"CommonName of client",
     "the gateway refuses a client certificate with a CN while "
     "authentication is on: use one without"},
    {", not for ", "the certificate is for another name: use one of those as the endpoint"},
    {"demands a login", "give --user (and --password)"},
    {"authentication failed", "the user or the password is wrong"},
    {"permission denied",
     "grant the user a role on the keys under the prefix: etcdctl role "
     "grant-permission"},
    {"no leader",
     "a majority of the members must run and reach each other: start the others, "
     "and look at their logs"},
    {"alarm:NOSPACE",
     "compact and defragment (etcdctl compact, etcdctl defrag), or raise "
     "--quota-backend-bytes; then etcdctl alarm disarm"},
    {"alarm:CORRUPT", "the data of the member are damaged: replace it"},
    {"onnection refused",
     "nothing listens there: is etcd running, and does "
     "--listen-client-urls name this address?"},
    {"host name not found", "the name is unknown here: is it spelled right?"},
    {"another cluster", "the endpoints are of more than one cluster: name those of one only"},
};

std::string remedy_for(const Error& error) {
  const auto text = to_string(error);
  for (const auto& symptom : kSymptoms) {
    if (text.find(symptom.text) != std::string::npos) return symptom.remedy;
  }
  if (error.code == ErrorCode::Timeout) {
    return "it is there and does not answer: a firewall, a stopped process, or a disk that is too "
           "slow";
  }
  return "";
}

std::int64_t number(const Answer& object, const char* name) {
  const auto it = object.find(name);
  if (it == object.end()) return 0;
  return it->is_string()   ? std::strtoll(it->get<std::string>().c_str(), nullptr, 10)
         : it->is_number() ? it->get<std::int64_t>()
                           : 0;
}

/// An unsigned one, as text: "0" if there is none.
std::string id(const Answer& object, const char* name) {
  const auto it = object.find(name);
  return it != object.end() && it->is_string() ? it->get<std::string>() : "0";
}

class Doctor {
 public:
  explicit Doctor(const Settings& settings) : settings_(settings), options_(with_logger(settings)) {
    options_.timeout = std::min(options_.timeout, kPatience);
    options_.retry_config.max_attempts = 1;
  }

  int examine() {
    validate(options_).value();
    for (const auto& endpoint : options_.endpoints) look_at(endpoint);
    compare();
    if (settings_.json) {
      print_json();
    } else {
      print_table();
    }
    const bool ill = std::any_of(findings_.begin(), findings_.end(),
                                 [](const Finding& finding) { return finding.is_error; });
    return ill ? int{kUnavailable} : int{kDone};
  }

 private:
  void find(bool is_error, const std::string& where, const std::string& problem,
            const std::string& remedy) {
    const auto same = [&](const Finding& f) { return f.where == where && f.problem == problem; };
    if (std::any_of(findings_.begin(), findings_.end(), same)) return;
    findings_.push_back({is_error, where, printable(problem), remedy});
  }
  void find(const std::string& where, const Error& error) {
    find(true, where, to_string(error), remedy_for(error));
  }

  void look_at(const std::string& endpoint) {
    auto options = options_;
    options.endpoints = {endpoint};
    Look look{endpoint};
    auto c = Coordinator::connect(options);  // asks for a key: needs login and leader
    if (!c) {
      find(endpoint, c.error());
      ask_status_alone(look);
      looks_.push_back(look);
      return;
    }
    look.answers = true;
    ask_status(c->client(), look);
    ask_login(c->client());
    ask_members(c->client());
    look_at_certificate(endpoint);
    looks_.push_back(look);
  }

  void ask_status(Client& client, Look& look) {
    const auto begin = steady_clock::now();
    auto status = client.call("/v3/maintenance/status", {}, Effect::Reads);
    look.latency = std::chrono::duration_cast<milliseconds>(steady_clock::now() - begin);
    if (look.latency > kSlow) {
      find(false, look.endpoint, "it answers after " + to_text(look.latency),
           "look at its disk (etcd's metric wal_fsync_duration) and at the network");
    }
    if (status) {
      look.status = std::move(*status);
      for (const auto& error : look.status.value("errors", Answer::array())) {  // alarms, too
        const auto text = error.is_string() ? error.get<std::string>() : error.dump();
        find(look.endpoint, {ErrorCode::Unavailable, text});
      }
    } else if (status.error().code != ErrorCode::PermissionDenied) {  // only root may ask
      find(look.endpoint, status.error());
    }
  }

  /// What it says to strangers: also without a leader.
  void ask_status_alone(Look& look) {
    const bool tls = !(options_.tls.ca_file + options_.tls.cert_file).empty();
    const bool has_scheme = look.endpoint.find("://") != std::string::npos;
    HttpRequest request;
    request.endpoint = (has_scheme ? "" : tls ? "https://" : "http://") + look.endpoint;
    request.path = "/v3/maintenance/status";
    request.headers = {{"Content-Type", "application/json"}};
    request.body = "{}";
    const auto reply = make_default_transport(options_.tls)
                           ->perform(request, {}, Context::with_timeout(kPatience));
    if (!reply || reply->status != 200) return;
    look.status = Answer::parse(reply->body, nullptr, false);
    if (!look.status.is_object()) look.status = nullptr;
  }

  /// The library takes it as it is when there is nothing to log in to.
  void ask_login(Client& client) {
    if (options_.username.empty()) return;
    const nlohmann::json body = {{"name", options_.username}, {"password", options_.password}};
    const auto login = client.call("/v3/auth/authenticate", body, Effect::Reads);
    if (!login && login.error().cause.find("is not enabled") != std::string::npos) {
      find(false, "login", "authentication is off: everybody may do everything",
           "leave --user out, or switch it on: etcdctl auth enable");
    }
  }

  void ask_members(Client& client) {
    if (!members_.is_null()) return;
    const auto list = client.call("/v3/cluster/member/list", {}, Effect::Reads);
    if (list) members_ = list->value("members", Answer::array());
    for (const auto& member : members_.is_null() ? Answer::array() : members_) {
      if (member.value("name", "").empty()) {
        find(false, "member " + id(member, "ID"), "it was added and has never been started",
             "start it, or remove it: etcdctl member remove");
      }
    }
  }

  std::string name_of(const std::string& member_id) const {
    for (const auto& member : members_.is_null() ? Answer::array() : members_) {
      if (id(member, "ID") == member_id) return printable(member.value("name", ""));
    }
    return "";
  }

  void compare() {
    std::set<std::string> versions, clusters;
    for (const auto& look : looks_) {
      if (look.status.is_null()) continue;
      versions.insert(look.status.value("version", "?"));
      clusters.insert(id(look.status.value("header", Answer::object()), "cluster_id"));
    }
    if (clusters.size() > 1) {
      find(true, "endpoints", "they are of different clusters", "name those of one cluster only");
    }
    if (versions.size() > 1) {
      find(false, "members", "they run different versions", "finish the upgrade");
    }
    const auto members = members_.is_null() ? 0 : members_.size();
    if (members > options_.endpoints.size()) {
      find(false, "endpoints",
           std::to_string(options_.endpoints.size()) + " of " + std::to_string(members) +
               " members are named",
           "name all of them: a client goes on with the others when one fails");
    }
    if (members > 0 && members % 2 == 0) {
      find(false, "members", "their number is even",
           "one member more survives the failure of more of them, one less of as many");
    }
  }

  // --- Certificates ---------------------------------------------------------------------------

#ifdef CPPHTTPLIB_OPENSSL_SUPPORT
  void look_at_certificate(const std::string& endpoint) {
    const auto& tls = options_.tls;
    if (!tls.cert_file.empty()) {
      BIO* file = BIO_new_file(tls.cert_file.c_str(), "r");
      X509* mine = file ? PEM_read_bio_X509(file, nullptr, nullptr, nullptr) : nullptr;
      BIO_free(file);
      judge_dates(mine, tls.cert_file);
    }
    const bool any = !(tls.ca_file + tls.cert_file).empty();
    if (endpoint.compare(0, 8, "https://") == 0 || (any && endpoint.find("://") == endpoint.npos)) {
      judge_dates(certificate_of(endpoint), endpoint);
    }
  }

  /// What a server shows. It is not verified here: connecting has done that.
  static X509* certificate_of(const std::string& endpoint) {
    auto host = endpoint.compare(0, 8, "https://") == 0 ? endpoint.substr(8) : endpoint;
    if (host.find(':') == host.npos) host += ":2379";
    SSL_CTX* context = SSL_CTX_new(TLS_client_method());
    BIO* connection = BIO_new_ssl_connect(context);
    BIO_set_conn_hostname(connection, host.c_str());
    SSL* ssl = nullptr;
    X509* certificate = nullptr;
    BIO_get_ssl(connection, &ssl);
    // A server that demands a client certificate has shown its own before it refuses us.
    BIO_do_connect(connection);
    if (ssl) certificate = SSL_get_peer_certificate(ssl);
    BIO_free_all(connection);
    SSL_CTX_free(context);
    return certificate;
  }

  void judge_dates(X509* certificate, const std::string& where) {
    if (!certificate) return;
    int days = 0, seconds = 0;
    ASN1_TIME_diff(&days, &seconds, nullptr, X509_get0_notAfter(certificate));
    X509_free(certificate);
    if (days >= 14) return;
    find(days < 0, where,
         days < 0 ? "its certificate has run out"
                  : "its certificate runs out in " + std::to_string(days) + " days",
         "renew it, or set this machine's clock right");
  }
#else
  void look_at_certificate(const std::string&) {}
#endif

  // --- Output ---------------------------------------------------------------------------------

  std::string role_of(const Answer& status) const {
    if (status.value("isLearner", false)) return "learner";
    const auto leader = id(status, "leader");
    if (leader == "0") return "no leader";
    return leader == id(status.value("header", Answer::object()), "member_id") ? "leader"
                                                                               : "follower";
  }

  Json describe(const Look& look) const {
    Json json{{"endpoint", look.endpoint}, {"answers", look.answers}};
    if (look.answers) json["latency_ms"] = look.latency.count();
    if (look.status.is_null()) return json;
    const auto header = look.status.value("header", Answer::object());
    json["name"] = name_of(id(header, "member_id"));
    json["version"] = look.status.value("version", "");
    json["role"] = role_of(look.status);
    json["db_size"] = number(look.status, "dbSize");
    json["revision"] = number(header, "revision");
    return json;
  }

  void print_json() const {
    Json json{{"members", Json::array()}, {"findings", Json::array()}};
    for (const auto& look : looks_) json["members"].push_back(describe(look));
    for (const auto& [is_error, where, problem, remedy] : findings_) {
      json["findings"].push_back({{"severity", is_error ? "error" : "warning"},
                                  {"where", where},
                                  {"problem", problem},
                                  {"remedy", remedy}});
    }
    print(json);
  }

  void print_table() const {
    Table table({"ENDPOINT", "MEMBER", "VERSION", "ROLE", "LATENCY", "DB SIZE", "REVISION"});
    for (const auto& look : looks_) {
      const auto json = describe(look);
      const auto text = [&](const char* name) { return printable(json.value(name, "-")); };
      const bool told = json.contains("db_size");
      const auto latency = look.latency.count() > 0 ? to_text(look.latency) : "<1ms";
      table.add({look.endpoint, text("name"), text("version"), text("role"),
                 look.answers ? latency : "-",
                 told ? std::to_string(json["db_size"].get<std::int64_t>() / 1024) + "K" : "-",
                 told ? std::to_string(json["revision"].get<std::int64_t>()) : "-"});
    }
    table.print();
    for (const auto& [is_error, where, problem, remedy] : findings_) {
      const auto kind =
          is_error ? coloured("error", Colour::Red) : coloured("warning", Colour::Yellow);
      std::printf("%s: %s: %s\n", kind.c_str(), where.c_str(), problem.c_str());
      if (!remedy.empty()) std::printf("  -> %s\n", remedy.c_str());
    }
    if (findings_.empty()) std::printf("%s\n", coloured("all is well", Colour::Green).c_str());
  }

  const Settings& settings_;
  CoordinatorOptions options_;
  std::vector<Look> looks_;
  Answer members_;  // null until somebody has told
  std::vector<Finding> findings_;
};

}  // namespace

int status(const Settings& settings) { return Doctor(settings).examine(); }

}  // namespace coordctl
