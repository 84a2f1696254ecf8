// Section 4: TLS. What is accepted, what is refused, and in which words.
#include <doctest/doctest.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>

#include "coordination.hpp"
#include "support/raw_server.hpp"
#include "support/scripted_transport.hpp"
#include "support/tls_files.hpp"
#include "support/tls_server.hpp"

using namespace coordination;
using namespace support;

namespace {

std::string content_of(const std::string& file) {
  std::ifstream stream(file);
  return {std::istreambuf_iterator<char>(stream), {}};
}

/// All the certificates of these tests; they are made once.
const TlsFiles& files() {
  static const auto made = [] {
    auto fresh = std::make_unique<TlsFiles>();
    const std::string here = "subjectAltName=IP:127.0.0.1,DNS:localhost\n";
    fresh->sign("good", "/CN=srv", here);
    fresh->sign("name-only", "/CN=localhost", "subjectAltName=DNS:localhost\n");
    fresh->sign("other-ip", "/CN=srv", "subjectAltName=IP:127.0.0.9\n");
    fresh->sign("zero-ip", "/CN=srv", "subjectAltName=IP:0.0.0.0\n");
    fresh->sign("cn-wild", "/CN=*.*.*.*", "basicConstraints=CA:FALSE\n");
    fresh->sign("cn-ip", "/CN=127.0.0.1", "subjectAltName=DNS:elsewhere.example\n");
    fresh->sign("cn-star", "/CN=*", "subjectAltName=DNS:elsewhere.example\n");
    fresh->sign("cn-name", "/CN=localhost", "basicConstraints=CA:FALSE\n");
    fresh->sign("wild", "/CN=srv", "subjectAltName=DNS:*.example.com\n");
    fresh->sign_for("expired", "/CN=srv", here, "20200101000000Z", "20210203040506Z");
    fresh->sign_for("not-yet", "/CN=srv", here, "20400102030405Z", "20410101000000Z");
    fresh->sign("client-other", "/O=app", "extendedKeyUsage=clientAuth\n", "other-ca");
    fresh->sign_for("client-old", "/O=app", "extendedKeyUsage=clientAuth\n", "20200101000000Z",
                    "20210101000000Z");
    fresh->lock_key("client", "sesame");
    std::ofstream(fresh->file("garbage.pem")) << "this is no pem\n";
    std::ofstream(fresh->file("empty.pem")) << "";
    return fresh;
  }();
  return *made;
}

TlsServerOptions served_with(const std::string& name) {
  return {files().file(name + ".pem"), files().file(name + ".key")};
}

TlsOptions trusting() {
  TlsOptions tls;
  tls.ca_file = files().ca();
  return tls;
}

Result<HttpResponse> ask(const std::string& endpoint, const TlsOptions& tls) {
  HttpRequest request;
  request.endpoint = endpoint;
  request.path = "/";
  request.body = "{}";
  return make_default_transport(tls)->perform(request, nullptr,
                                              Context::with_timeout(lenient(10s)));
}

/// One line of the table: what was set up, what came of it, and in which words.
template <class T>
void row(const char* title, const Result<T>& answer, const std::string& essential,
         ErrorCode code = ErrorCode::Connection, Outcome outcome = Outcome::NotApplied) {
  std::printf("  %-44s %s\n", title, text_of(answer).c_str());
  INFO(std::string(title));
  if (essential == "ok") {
    CHECK_MESSAGE(answer, text_of(answer));
    return;
  }
  REQUIRE_FALSE(answer);
  INFO(text_of(answer));
  CHECK(text_of(answer).find(essential) != std::string::npos);
  CHECK(std::string(to_string(answer.error().code)) == to_string(code));
  CHECK(answer.error().outcome == outcome);
}

void row_of(const char* title, const std::string& certificate, const std::string& host,
            const std::string& essential, const TlsOptions& tls = trusting()) {
  const TlsServer server(served_with(certificate));
  row(title, ask(server.url(host), tls), essential);
  CHECK(server.requests() == (essential == "ok" ? 1 : 0));
}

}  // namespace

TEST_CASE("TLS: which server is believed, and what is said of the others") {
  row_of("all is well, by address", "good", "127.0.0.1", "ok");
  row_of("all is well, by name", "good", "localhost", "ok");
  row_of("a certificate for the name only, by name", "name-only", "localhost", "ok");
  row_of("a certificate for the name only, by address", "name-only", "127.0.0.1",
         "the certificate of the server is for localhost, not for 127.0.0.1");
  row_of("a certificate for another address", "other-ip", "127.0.0.1",
         "is for 127.0.0.9, not for 127.0.0.1");
  row_of("a certificate for 0.0.0.0", "zero-ip", "127.0.0.1", "is for 0.0.0.0, not for 127.0.0.1");
  row_of("a CN of wildcards, by address", "cn-wild", "127.0.0.1", "not for 127.0.0.1");
  row_of("a CN of wildcards, by name", "cn-wild", "localhost", "not for localhost");
  row_of("the address as CN, another name beside it", "cn-ip", "127.0.0.1",
         "is for elsewhere.example, not for 127.0.0.1");
  row_of("* as CN, another name beside it", "cn-star", "localhost",
         "is for elsewhere.example, not for localhost");
  row_of("the name as CN, and no subjectAltName", "cn-name", "localhost",
         "is for no host (it has no subjectAltName), not for localhost");
  row_of("expired", "expired", "127.0.0.1",
         "the certificate of the server has expired on 2021-02-03 04:05:06 UTC");
  row_of("not yet valid", "not-yet", "127.0.0.1",
         "is not yet valid, but from 2040-01-02 03:04:05 UTC");
  auto tls = trusting();
  tls.ca_file = files().other_ca();
  row_of("another CA", "good", "127.0.0.1", "was issued by an unknown CA: /CN=ca", tls);
  row_of("no CA given", "good", "127.0.0.1", "was issued by an unknown CA: /CN=ca", {});
  tls.verify_server = false;
  row_of("another CA, and nobody verifies", "expired", "127.0.0.1", "ok", tls);
  tls = trusting();
  tls.server_name = "etcd-1.example.com";
  row_of("a wildcard, by a name that is given", "wild", "127.0.0.1", "ok", tls);
  tls.server_name = "a.etcd-1.example.com";
  row_of("a wildcard stands for one label", "wild", "127.0.0.1",
         "is for *.example.com, not for a.etcd-1.example.com", tls);
}

TEST_CASE("TLS: the files, and what is wrong with them") {
  const TlsServer server(served_with("good"));
  const auto said = [&](const char* title, const std::function<void(TlsOptions&)>& change,
                        const std::string& essential) {
    auto tls = trusting();
    change(tls);
    row(title, ask(server.url("127.0.0.1"), tls), essential, ErrorCode::Validation);
  };
  const auto file = [](const char* name) { return files().file(name); };
  const auto client = [&](const char* cert, const char* key) {
    return [=](TlsOptions& o) {
      o.cert_file = files().file(cert);
      o.key_file = files().file(key);
    };
  };
  said(
      "the CA file does not exist", [&](auto& o) { o.ca_file = file("nowhere.pem"); },
      "tls.ca_file " + file("nowhere.pem") + " cannot be read: No such file or directory");
  said(
      "the CA file is a folder", [&](auto& o) { o.ca_file = file(""); },
      "tls.ca_file " + file("") + " cannot be read: Is a directory");
  said(
      "the CA file is garbage", [&](auto& o) { o.ca_file = file("garbage.pem"); },
      "tls.ca_file " + file("garbage.pem") + " holds no certificate in PEM");
  said(
      "the CA file is empty", [&](auto& o) { o.ca_file = file("empty.pem"); },
      "tls.ca_file " + file("empty.pem") + " holds no certificate in PEM");
  said(
      "the CA text is garbage", [&](auto& o) { o.ca_pem = "garbage"; },
      "tls.ca_pem holds no certificate in PEM");
  said("the certificate does not exist", client("nowhere.pem", "client.key"),
       "tls.cert_file " + file("nowhere.pem") + " cannot be read");
  said("the key does not exist", client("client.pem", "nowhere.key"),
       "tls.key_file " + file("nowhere.key") + " cannot be read");
  said("the key is garbage", client("client.pem", "garbage.pem"),
       "tls.key_file " + file("garbage.pem") + " holds no private key in PEM");
  said("the key is another's", client("client.pem", "good.key"),
       "tls.key_file " + file("good.key") + " is not the key of tls.cert_file " +
           file("client.pem"));
  said("the key is encrypted", client("client.pem", "client.locked"),
       "is encrypted, and tls.key_password does not open it");
  CHECK(server.requests() == 0);
}

TEST_CASE("TLS: bad files are told at connect, at once, whatever the endpoints are") {
  const RawServer server([](Wire& wire) { wire.wait_for_end(); });
  for (const std::string scheme : {"", "http://", "https://"}) {
    CoordinatorOptions options;
    options.endpoints = {scheme + server.url().substr(7), "127.0.0.1:2"};
    options.tls.ca_file = files().file("nowhere.pem");
    auto connected = Coordinator::connect(options);
    REQUIRE_FALSE(connected);
    CHECK(connected.error().code == ErrorCode::Validation);
    CHECK(text_of(connected).find(options.tls.ca_file) != std::string::npos);
    options.tls = trusting();
    options.tls.cert_file = files().client_cert();
    options.tls.key_file = files().file("good.key");
    connected = Coordinator::connect(options);
    REQUIRE_FALSE(connected);
    CHECK(connected.error().code == ErrorCode::Validation);
    CHECK(text_of(connected).find("is not the key of tls.cert_file") != std::string::npos);
  }
  CHECK(server.connections() == 0);
}

TEST_CASE("TLS: that no member will ever be believed is told soon; that some are down is not") {
  const TlsServer one(served_with("good")), two(served_with("expired"));
  CoordinatorOptions options;
  options.timeout = 60s;
  options.tls.ca_file = files().other_ca();
  options.endpoints = {one.url("127.0.0.1"), two.url("localhost")};
  const Stopwatch watch;
  const auto never = Coordinator::connect(options);
  row("another CA, two endpoints", never, "unknown CA");
  CHECK(text_of(never).find("localhost") != std::string::npos);
  CHECK(watch.over(lenient(15s)) == 0);
  options.timeout = 2s;
  options.endpoints[1] = "https://127.0.0.1:" + std::to_string(closed_port());
  const Stopwatch longer;
  const auto yet = Coordinator::connect(options);
  for (const char* why : {"unknown CA", "connection refused"}) {
    CHECK_MESSAGE(text_of(yet).find(why) != std::string::npos, text_of(yet));
  }
  CHECK(longer.elapsed() >= 1s);
  options.endpoints[0] = one.url("localhost");
  options.tls = trusting();
  const auto transport = make_default_transport(options.tls);
  row("one endpoint down, one that is well", ask(one.url("localhost"), options.tls), "ok");
}

TEST_CASE("TLS: http and https at the wrong port, and what is no server") {
  const TlsServer tls(served_with("good"));
  const RawServer plain([](Wire& wire) {
    wire.read_some();
    wire.send(http("400 Bad Request", ""));
    wire.wait_for_end();
  });
  const auto to = [](const char* scheme, const std::string& url) {
    return scheme + url.substr(url.find(":/"));
  };
  const auto closed = "127.0.0.1:" + std::to_string(closed_port());
  row("https to an http port", ask(to("https", plain.url()), trusting()), "is it an http port?");
  row("http to an https port", ask(to("http", tls.url("127.0.0.1")), {}), "https port",
      ErrorCode::Connection, Outcome::MaybeApplied);
  row("http, refused", ask("http://" + closed, {}), "connection refused");
  row("https, refused", ask("https://" + closed, trusting()), "connection refused");
  row("an unknown host", ask("https://no-such-host.invalid:1", {}), "host name not found: ");
  CHECK(tls.requests() == 0);
}

TEST_CASE("TLS: client certificates") {
  for (const int version : {TLS1_2_VERSION, TLS1_3_VERSION}) {
    auto options = served_with("good");
    options.client_ca = files().ca();
    options.max_version = version;
    const TlsServer server(options);
    std::printf("  with TLS 1.%c:\n", version == TLS1_2_VERSION ? '2' : '3');
    const auto said = [&](const char* title, const char* cert, const char* key,
                          const std::string& essential, const std::string& password = "") {
      auto tls = trusting();
      if (*cert != '\0') tls.cert_file = files().file(cert);
      if (*key != '\0') tls.key_file = files().file(key);
      tls.key_password = password;
      row(title, ask(server.url("127.0.0.1"), tls), essential);
    };
    said("shown", "client.pem", "client.key", "ok");
    said("shown, with an encrypted key", "client.pem", "client.locked", "ok", "sesame");
    CHECK(server.requests() == 2);
    said("missing", "", "", "the server demands a client certificate");
    said("of another CA", "client-other.pem", "client-other.key",
         "the server has refused the client certificate");
    said("expired", "client-old.pem", "client-old.key",
         "the server has refused the client certificate");
    CHECK(server.requests() == 2);
  }
}

TEST_CASE("TLS: as texts instead of files; the texts go first") {
  auto options = served_with("good");
  options.client_ca = files().ca();
  const TlsServer server(options);
  TlsOptions tls;
  tls.ca_file = tls.cert_file = tls.key_file = "/no/such/file";
  tls.ca_pem = content_of(files().other_ca()) + content_of(files().ca());
  tls.cert_pem = content_of(files().client_cert());
  tls.key_pem = content_of(files().client_key());
  const auto answer = ask(server.url("127.0.0.1"), tls);
  CHECK_MESSAGE(answer, text_of(answer));
}

TEST_CASE("TLS: versions") {
  auto options = served_with("good");
  options.max_version = TLS1_2_VERSION;
  const TlsServer server(options);
  auto tls = trusting();
  row("a server with TLS 1.2", ask(server.url("127.0.0.1"), tls), "ok");
  tls.min_version = TlsVersion::Tls13;
  row("the same, where 1.3 is the least", ask(server.url("127.0.0.1"), tls),
      "no version of TLS that is new enough");
  options.max_version = TLS1_1_VERSION;
  options.low_security = true;
  const TlsServer old(options);
  row("a server with TLS 1.1 at most", ask(old.url("127.0.0.1"), trusting()),
      "no version of TLS that is new enough");
}

TEST_CASE("TLS: a file that is replaced counts for the next connection; half of a pair does not") {
  auto options = served_with("good");
  options.client_ca = files().ca();
  const TlsServer server(options);
  const TempDir folder;
  const auto put = [&](const char* name, const std::string& from) {
    std::ofstream(folder.file(name)) << content_of(files().file(from));
  };
  put("cert", "client-old.pem");
  put("key", "client-old.key");
  auto tls = trusting();
  tls.cert_file = folder.file("cert");
  tls.key_file = folder.file("key");
  const auto transport = make_default_transport(tls);
  HttpRequest request;
  request.endpoint = server.url("127.0.0.1");
  request.body = "{}";
  request.path = "/";
  request.headers.emplace_back("Connection", "close");  // each request has a connection of its own
  const auto works = [&] {
    return static_cast<bool>(
        transport->perform(request, nullptr, Context::with_timeout(lenient(10s))));
  };
  CHECK_FALSE(works());
  put("cert", "client.pem");
  CHECK_FALSE(works());  // with the old pair, and without a complaint of ours
  put("key", "client.key");
  CHECK(works());
  put("key", "good.key");
  CHECK(works());
  std::remove(folder.file("cert").c_str());
  CHECK(works());
}
