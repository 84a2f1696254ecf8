#include "dev_server.hpp"

#include <httplib.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <thread>
#include <utility>

namespace coordctl {

using namespace coordination;

namespace {

constexpr const char* kJson = "application/json";

/// One request whose answer comes piece by piece. MemoryEtcd gives the pieces in a thread of its
/// own, cpp-httplib takes them in another.
class Stream {
 public:
  Stream(std::shared_ptr<MemoryEtcd> etcd, HttpRequest request, const Context& open)
      : ctx_(Context::child_of(open)),
        thread_([this, etcd = std::move(etcd), request = std::move(request)] {
          const auto sink = [this](std::string_view bytes) { return add(bytes), true; };
          finish(etcd->perform(request, sink, ctx_));
        }) {}
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() {
    ctx_.cancel();
    thread_.join();
  }

  /// Blocks: until there is a piece, or it has ended without one. Then its end.
  const Result<HttpResponse>* end_without_pieces() {
    std::unique_lock<std::mutex> hold(mutex_);
    changed_.wait(hold, [this] { return end_ || !pieces_.empty(); });
    return pieces_.empty() ? &*end_ : nullptr;
  }
  /// Writes what there is; false if the connection is to be cut.
  bool give(httplib::DataSink& to) {
    std::unique_lock<std::mutex> hold(mutex_);
    changed_.wait_for(hold, std::chrono::milliseconds(200),
                      [this] { return end_ || !pieces_.empty(); });
    if (!pieces_.empty()) {
      const auto piece = std::move(pieces_.front());
      pieces_.pop_front();
      hold.unlock();
      return to.write(piece.data(), piece.size());
    }
    if (!end_) return to.is_writable();
    if (*end_) to.done();
    return end_->has_value();
  }

 private:
  void add(std::string_view bytes) {
    const std::lock_guard<std::mutex> hold(mutex_);
    pieces_.emplace_back(bytes);
    changed_.notify_all();
  }
  void finish(Result<HttpResponse> end) {
    const std::lock_guard<std::mutex> hold(mutex_);
    end_.emplace(std::move(end));
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::string> pieces_;
  std::optional<Result<HttpResponse>> end_;
  Context ctx_;
  std::thread thread_;  // the last: it uses the others
};

bool is_stream(const std::string& path) {
  return path == "/v3/watch" || path == "/v3/lease/keepalive";
}

/// As etcd's gateway, which does not look at the case of a header's name.
HttpRequest translate(const httplib::Request& from, std::string body) {
  HttpRequest request;
  request.endpoint = "http://dev-server";
  request.path = from.path;
  request.body = std::move(body);
  for (const char* name : {"Authorization", "Grpc-Metadata-hasleader"}) {
    if (from.has_header(name)) request.headers.emplace_back(name, from.get_header_value(name));
  }
  return request;
}

void answer_whole(const Result<HttpResponse>& from, httplib::Response& to) {
  if (!from) {  // one of MemoryEtcd's faults
    to.status = 503;
    to.set_content(to_string(from.error()) + "\n", "text/plain");
    return;
  }
  to.status = from->status;
  to.set_content(from->body, kJson);
}

}  // namespace

struct DevServer::State {
  explicit State(std::shared_ptr<MemoryEtcd> memory) : etcd(std::move(memory)) {}

  void answer(const HttpRequest& request, httplib::Response& to) {
    if (!is_stream(request.path)) return answer_whole(etcd->perform(request, {}, open), to);
    const auto stream = std::make_shared<Stream>(etcd, request, open);
    if (const auto* end = stream->end_without_pieces()) return answer_whole(*end, to);
    to.status = 200;
    to.set_chunked_content_provider(
        kJson, [stream](std::size_t, httplib::DataSink& sink) { return stream->give(sink); });
  }

  std::shared_ptr<MemoryEtcd> etcd;
  Context open;  // cancelled when the server stops
  httplib::Server server;
  std::thread thread;
};

DevServer::DevServer(std::shared_ptr<MemoryEtcd> etcd, const std::string& host, int port)
    : state_(std::make_unique<State>(std::move(etcd))) {
  auto& server = state_->server;
  // A connection has a thread for as long as it is open, and so has a stream.
  server.new_task_queue = [] { return new httplib::ThreadPool(128); };
  server.set_tcp_nodelay(true);
  server.set_keep_alive_max_count(1'000'000);
  server.set_keep_alive_timeout(2);  // so long it may take to stop, too
  // Not SO_REUSEPORT: a second server on the port shall fail.
  server.set_socket_options([](auto socket) {
    const int yes = 1;
    setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  });
  // With a reader: else cpp-httplib refuses more than 8 KiB of what curl sends.
  server.Post(".*", [this](const httplib::Request& in, httplib::Response& out,
                           const httplib::ContentReader& read) {
    std::string body;
    read([&](const char* bytes, std::size_t size) { return body.append(bytes, size), true; });
    state_->answer(translate(in, std::move(body)), out);
  });
  server.Get("/health", [](const httplib::Request&, httplib::Response& out) {
    out.set_content(R"({"health":"true","reason":""})", kJson);
  });
  server.Get("/version", [](const httplib::Request&, httplib::Response& out) {
    out.set_content(R"({"etcdserver":"3.5.30","etcdcluster":"3.5.0"})", kJson);
  });
  port_ = port != 0 ? (server.bind_to_port(host, port) ? port : -1) : server.bind_to_any_port(host);
  if (port_ <= 0) {
    throw std::runtime_error("cannot listen on " + host + ":" + std::to_string(port) + ": " +
                             std::strerror(errno));
  }
  state_->thread = std::thread([&server] { server.listen_after_bind(); });
  // A server that does not listen yet would not notice that it is stopped.
  while (!server.is_running()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

DevServer::~DevServer() {
  state_->open.cancel();
  state_->server.stop();
  state_->thread.join();
}

}  // namespace coordctl
