// A Transport on libcurl, in place of the one on cpp-httplib.
#pragma once

#include <curl/curl.h>
#include <coordination.hpp>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

class CurlTransport : public coordination::Transport {
 public:
  using milliseconds = std::chrono::milliseconds;

  explicit CurlTransport(coordination::TlsOptions tls = {}) : tls_(std::move(tls)) {
    static const CURLcode once = curl_global_init(CURL_GLOBAL_DEFAULT);
    static_cast<void>(once);
  }

  coordination::Result<coordination::HttpResponse> perform(
      const coordination::HttpRequest& request, const coordination::ChunkSink& sink,
      const coordination::Context& ctx) override {
    Exchange exchange(request, sink);
    set_options(exchange);
    CURLM* multi = exchange.multi.get();
    // A cancel from another thread ends the wait below. The hook is gone before `multi` is.
    const auto hook = ctx.on_cancel([multi] { curl_multi_wakeup(multi); });
    curl_multi_add_handle(multi, exchange.easy.get());
    int running = 1;
    while (running != 0 && !ctx.done() && !exchange.is_idle()) {
      curl_multi_perform(multi, &running);
      if (running == 0) break;
      curl_multi_poll(multi, nullptr, 0, static_cast<int>(exchange.wait(ctx).count()), nullptr);
    }
    auto result = exchange.result(ctx);
    curl_multi_remove_handle(multi, exchange.easy.get());
    return result;
  }

 private:
  template <auto free>
  struct Free {
    template <class T>
    void operator()(T* handle) const {
      free(handle);
    }
  };

  /// One request and its answer, on a connection of its own: on one that was used before, libcurl
  /// would by itself send a write again when that connection turns out to be dead.
  struct Exchange {
    Exchange(const coordination::HttpRequest& to_send, const coordination::ChunkSink& to)
        : request(to_send), sink(to) {
      append("Content-Type: application/json");
      append("Expect:");  // do not ask before sending a body
      for (const auto& [name, value] : request.headers) append(name + ": " + value);
    }
    void append(const std::string& header) {
      headers.reset(curl_slist_append(headers.release(), header.c_str()));
    }

    std::size_t take(std::string_view bytes) {
      curl_easy_getinfo(easy.get(), CURLINFO_RESPONSE_CODE, &status);
      last_byte = std::chrono::steady_clock::now();
      const bool streamed = sink && status / 100 == 2;
      if (!streamed) body.append(bytes);
      ended_here = streamed ? !sink(bytes) : body.size() > kLongestBody;
      return ended_here ? 0 : bytes.size();
    }

    milliseconds idle() const {
      return std::chrono::duration_cast<milliseconds>(std::chrono::steady_clock::now() - last_byte);
    }
    bool is_idle() const {
      return request.idle_timeout.count() > 0 && idle() >= request.idle_timeout;
    }
    /// Until something is due, however quiet the connection is.
    milliseconds wait(const coordination::Context& ctx) const {
      milliseconds time(1000);
      if (request.idle_timeout.count() > 0) time = std::min(time, request.idle_timeout - idle());
      if (const auto deadline = ctx.deadline()) {
        const auto left = *deadline - std::chrono::steady_clock::now();
        time = std::min(time, std::chrono::ceil<milliseconds>(left));
      }
      return std::max(time, milliseconds(0));
    }

    coordination::Result<coordination::HttpResponse> result(const coordination::Context& ctx) {
      using coordination::ErrorCode;
      int rest = 0;
      const CURLMsg* message = curl_multi_info_read(multi.get(), &rest);
      const bool complete = message != nullptr && message->data.result == CURLE_OK;
      if (ctx.cancelled()) return error(ErrorCode::Cancelled, "cancelled");
      if (complete || (ended_here && sink)) {
        curl_easy_getinfo(easy.get(), CURLINFO_RESPONSE_CODE, &status);
        return coordination::HttpResponse{static_cast<int>(status), std::move(body)};
      }
      if (ctx.done()) return error(ErrorCode::Timeout, "the deadline has passed");
      if (ended_here) return error(ErrorCode::Internal, "the answer is too long");
      if (message == nullptr) return error(ErrorCode::Connection, "no byte came any more");
      return error(ErrorCode::Connection, curl_easy_strerror(message->data.result));
    }
    coordination::Error error(coordination::ErrorCode code, const std::string& what) const {
      long sent = 0;
      curl_easy_getinfo(easy.get(), CURLINFO_REQUEST_SIZE, &sent);
      return {code, request.endpoint + ": " + what, "",
              sent > 0 ? coordination::Outcome::MaybeApplied : coordination::Outcome::NotApplied,
              0};
    }

    static constexpr std::size_t kLongestBody = 64 << 20;
    const coordination::HttpRequest& request;
    const coordination::ChunkSink& sink;
    std::unique_ptr<curl_slist, Free<curl_slist_free_all>> headers;
    std::unique_ptr<CURLM, Free<curl_multi_cleanup>> multi{curl_multi_init()};
    std::unique_ptr<CURL, Free<curl_easy_cleanup>> easy{curl_easy_init()};
    std::chrono::steady_clock::time_point last_byte = std::chrono::steady_clock::now();
    long status{0};
    std::string body;
    bool ended_here{false};
  };

  static std::size_t on_bytes(char* bytes, std::size_t, std::size_t size, void* exchange) {
    return static_cast<Exchange*>(exchange)->take({bytes, size});
  }

  void set_options(Exchange& exchange) const {
    const auto set = [&](CURLoption option, auto value) {
      curl_easy_setopt(exchange.easy.get(), option, value);
    };
    set(CURLOPT_URL, (exchange.request.endpoint + exchange.request.path).c_str());
    set(CURLOPT_NOPROXY, "*");
    set(CURLOPT_NOSIGNAL, 1L);
    set(CURLOPT_HTTP_VERSION, static_cast<long>(CURL_HTTP_VERSION_1_1));
    set(CURLOPT_HTTPHEADER, exchange.headers.get());
    set(CURLOPT_POSTFIELDSIZE_LARGE, static_cast<curl_off_t>(exchange.request.body.size()));
    set(CURLOPT_POSTFIELDS, exchange.request.body.data());
    set(CURLOPT_WRITEFUNCTION, &CurlTransport::on_bytes);
    set(CURLOPT_WRITEDATA, static_cast<void*>(&exchange));
    set(CURLOPT_SSL_VERIFYPEER, tls_.verify_server ? 1L : 0L);
    set(CURLOPT_SSL_VERIFYHOST, tls_.verify_server ? 2L : 0L);
    if (!tls_.ca_file.empty()) set(CURLOPT_CAINFO, tls_.ca_file.c_str());
    if (!tls_.cert_file.empty()) set(CURLOPT_SSLCERT, tls_.cert_file.c_str());
    if (!tls_.key_file.empty()) set(CURLOPT_SSLKEY, tls_.key_file.c_str());
  }

  const coordination::TlsOptions tls_;
};
