// What the library is measured against: raw sockets (the limit), cpp-httplib with nlohmann/json
// and nothing else, and etcd's own lock service.
#include <httplib.h>

#include <atomic>
#include <nlohmann/json.hpp>
#include <thread>

#include "worker.hpp"

namespace bench {
namespace {

using nlohmann::json;

std::string base64(const std::string& bytes) {
  static const char* const digits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    unsigned group = 0;
    for (std::size_t k = 0; k < 3; ++k) {
      group = group << 8 | (i + k < bytes.size() ? static_cast<unsigned char>(bytes[i + k]) : 0);
    }
    for (std::size_t k = 0; k < 4; ++k) {
      text += i + k > bytes.size() ? '=' : digits[group >> (18 - 6 * k) & 63];
    }
  }
  return text;
}

std::string put_body(const std::string& key) {
  return R"({"key":")" + base64(key) + R"(","value":")" + base64(kValue) + "\"}";
}
std::string get_body(const std::string& key) { return R"({"key":")" + base64(key) + "\"}"; }

/// In one body; etcd reads all of it only on a connection that is to be closed.
std::string watch_body(const std::vector<std::string>& keys) {
  std::string body;
  for (const auto& key : keys) body += R"({"create_request":)" + get_body(key) + "}\n";
  return body;
}

int count(const std::string& text, const std::string& part) {
  int n = 0;
  for (auto at = text.find(part); at != text.npos; at = text.find(part, at + 1)) ++n;
  return n;
}

/// One connection, one write a request.
class Socket {
 public:
  explicit Socket(const std::string& url) {
    const auto colon = url.rfind(':');
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<std::uint16_t>(std::stoi(url.substr(colon + 1))));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    fd_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const int on = 1;
    setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    if (connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) fail("connect");
  }
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  ~Socket() { close(fd_); }

  static std::string request(const std::string& path, const std::string& body,
                             const std::string& header = "") {
    return "POST " + path + " HTTP/1.1\r\nHost: etcd\r\n" + header +
           "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
  }
  /// Returns head and body, as they are.
  const std::string& perform(const std::string& request) {
    send(request);
    answer_.clear();
    while (!complete()) receive();
    if (answer_.compare(9, 3, "200") != 0) fail("an answer: " + answer_);
    return answer_;
  }
  void send(const std::string& request) {
    for (std::size_t sent = 0; sent < request.size();) {
      const auto n = ::send(fd_, request.data() + sent, request.size() - sent, MSG_NOSIGNAL);
      if (n <= 0) fail("send");
      sent += static_cast<std::size_t>(n);
    }
  }
  /// What has come since the last call; empty at the end.
  std::string read() {
    std::string bytes(65536, '\0');
    const auto n = recv(fd_, bytes.data(), bytes.size(), 0);
    bytes.resize(n > 0 ? static_cast<std::size_t>(n) : 0);
    return bytes;
  }
  void stop() { shutdown(fd_, SHUT_RDWR); }

 private:
  [[noreturn]] static void fail(const std::string& what) {
    throw std::runtime_error("raw: " + what);
  }
  void receive() {
    char bytes[16384];
    const auto n = recv(fd_, bytes, sizeof(bytes), 0);
    if (n <= 0) fail("the end of the connection");
    answer_.append(bytes, static_cast<std::size_t>(n));
  }
  bool complete() const {
    static const std::string kLength = "Content-Length: ", kEnd = "0\r\n\r\n";
    const auto head = answer_.find("\r\n\r\n");
    if (head == answer_.npos) return false;
    const auto length = answer_.find(kLength);
    if (length < head) {
      return answer_.size() >= head + 4 + std::stoul(answer_.substr(length + kLength.size(), 12));
    }
    return answer_.size() >= head + 4 + kEnd.size() &&
           answer_.compare(answer_.size() - kEnd.size(), kEnd.size(), kEnd) == 0;
  }

  int fd_{-1};
  std::string answer_;
};

/// A new lease, as text.
std::string grant_lease(Socket& socket) {
  const auto answer = socket.perform(
      Socket::request("/v3/lease/grant", R"({"TTL":")" + std::to_string(kTtl) + "\"}"));
  const std::string name = R"("ID":")";
  const auto begin = answer.find(name) + name.size();
  return answer.substr(begin, answer.find('"', begin) - begin);
}

/// Requests that were made before they are needed.
class Raw : public Seat {
 public:
  Raw(const Job& job, int number)
      : url_(job.url), socket_(job.url),
        get_(Socket::request("/v3/kv/range", get_body(key_of(number)))),
        put_(Socket::request("/v3/kv/put", put_body(key_of(number)))) {
    if (job.work == "lock") prepare_lock();
  }
  ~Raw() override {
    if (!stream_) return;
    stream_->stop();
    thread_.join();
  }
  void get() override { socket_.perform(get_); }
  void put() override { socket_.perform(put_); }
  void lock() override { socket_.perform(lock_); }
  void unlock() override { socket_.perform(unlock_); }
  void watch(const std::vector<std::string>& keys, std::function<void()> arrived) override {
    stream_ = std::make_unique<Socket>(url_);
    stream_->send(Socket::request("/v3/watch", watch_body(keys), "Connection: close\r\n"));
    int created = 0;
    while (created < static_cast<int>(keys.size())) {
      created += count(take_lines(), R"("created":true)");
    }
    thread_ = std::thread([this, arrived] {
      for (auto lines = take_lines(); !lines.empty(); lines = take_lines()) {
        for (int n = count(lines, R"("events":)"); n > 0; --n) arrived();
      }
    });
  }

 private:
  /// Two Txns, as a lock on a lease that is used again needs them.
  void prepare_lock() {
    const auto key = R"("key":")" + base64(kLock) + "\"";
    const auto lease = grant_lease(socket_);
    lock_ =
        Socket::request("/v3/kv/txn", "{\"compare\":[{" + key +
                                          R"(,"target":"CREATE","create_revision":"0"}],"success":)"
                                          "[{\"request_put\":{" +
                                          key + ",\"lease\":\"" + lease +
                                          "\"}}],\"failure\":[{\"request_range\":{" + key + "}}]}");
    unlock_ =
        Socket::request("/v3/kv/txn", "{\"success\":[{\"request_delete_range\":{" + key + "}}]}");
  }
  /// Whole lines of the stream; empty at its end.
  std::string take_lines() {
    std::size_t end = 0;
    while ((end = rest_.rfind('\n')) == rest_.npos || end == 0) {
      const auto bytes = stream_->read();
      if (bytes.empty()) return "";
      rest_ += bytes;
    }
    auto lines = rest_.substr(0, end + 1);
    rest_.erase(0, end + 1);
    return lines;
  }

  const std::string url_;
  Socket socket_;
  std::string get_, put_, lock_, unlock_;
  std::unique_ptr<Socket> stream_;
  std::string rest_;
  std::thread thread_;
};

/// What a user would write in an hour.
class Bare : public Seat {
 public:
  Bare(const Job& job, int number) : job_(job), http_(job.url), key_(key_of(number)) {
    prepare(http_);
  }
  ~Bare() override {
    if (!stream_) return;
    stream_->stop();
    thread_.join();
  }
  void get() override {
    const auto answer = post(http_, "/v3/kv/range", {{"key", base64(key_)}});
    value_ = answer["kvs"][0]["value"].get<std::string>();
  }
  void put() override {
    post(http_, "/v3/kv/put", {{"key", base64(key_)}, {"value", base64(kValue)}});
  }
  void watch(const std::vector<std::string>& keys, std::function<void()> arrived) override {
    stream_ = std::make_unique<httplib::Client>(job_.url);
    prepare(*stream_);
    stream_->set_keep_alive(false);
    stream_->set_read_timeout(600);
    thread_ = std::thread([this, keys, arrived] { read_stream(keys, arrived); });
    while (!created_) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }

 protected:
  static json post(httplib::Client& http, const char* path, const json& body) {
    const auto answer = http.Post(path, body.dump(), "application/json");
    if (!answer || answer->status != 200) throw std::runtime_error(std::string("bare: ") + path);
    return json::parse(answer->body);
  }
  void prepare(httplib::Client& http) {
    http.set_keep_alive(true);
    http.set_tcp_nodelay(true);
    http.set_read_timeout(60);
    if (!job_.ca.empty()) http.set_ca_cert_path(job_.ca.c_str());
  }
  void read_stream(const std::vector<std::string>& keys, const std::function<void()>& arrived) {
    std::string rest;
    httplib::Request request;
    request.method = "POST";
    request.path = "/v3/watch";
    request.body = watch_body(keys);
    request.content_receiver = [&](const char* bytes, std::size_t n, std::uint64_t, std::uint64_t) {
      rest.append(bytes, n);
      for (auto end = rest.find('\n'); end != rest.npos; end = rest.find('\n')) {
        const auto line = json::parse(rest.substr(0, end));
        rest.erase(0, end + 1);
        if (line["result"].contains("created")) created_ = true;
        if (line["result"].contains("events")) arrived();
      }
      return true;
    };
    stream_->send(request);
  }

  const Job job_;
  httplib::Client http_;
  const std::string key_;
  std::string value_;
  std::unique_ptr<httplib::Client> stream_;
  std::atomic<bool> created_{false};
  std::thread thread_;
};

/// /v3/lock, with a lease that is used again.
class LockService : public Bare {
 public:
  LockService(const Job& job, int number) : Bare(job, number) {
    lease_ = post(http_, "/v3/lease/grant", {{"TTL", kTtl}})["ID"].get<std::string>();
  }
  void lock() override {
    held_ = post(http_, "/v3/lock/lock", {{"name", base64(kLock)}, {"lease", lease_}})["key"];
  }
  void unlock() override { post(http_, "/v3/lock/unlock", {{"key", held_}}); }

 private:
  std::string lease_, held_;
};

template <class T>
Contender contender(const Job& job) {
  const auto make = [job](int number) { return std::make_unique<T>(job, number); };
  return {make, make};  // a connection each
}

}  // namespace

Contender raw(const Job& job) { return contender<Raw>(job); }
Contender bare(const Job& job) { return contender<Bare>(job); }
Contender lock_service(const Job& job) { return contender<LockService>(job); }

void put_all(const Job& job, const std::vector<std::string>& keys) {
  constexpr std::size_t kMostOps = 128;
  Socket socket(job.url);
  for (std::size_t begin = 0; begin < keys.size(); begin += kMostOps) {
    std::string ops;
    for (std::size_t i = begin; i < std::min(keys.size(), begin + kMostOps); ++i) {
      ops += (ops.empty() ? "" : ",") + (R"({"request_put":)" + put_body(keys[i]) + "}");
    }
    socket.perform(Socket::request("/v3/kv/txn", R"({"success":[)" + ops + "]}"));
  }
}

}  // namespace bench
