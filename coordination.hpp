// coordination.hpp - distributed locks, service discovery and configuration on etcd. C++17.
// SPDX-License-Identifier: MIT
//
//   #include "coordination.hpp"
//
//   auto c = coordination::Coordinator::connect({{"127.0.0.1:2379"}}).value();
//   auto lock = c.lock().acquire("jobs/nightly", std::chrono::seconds(10)).value();
//   if (lock.held()) run_the_job(lock.fencing_token());
//   lock.unlock().value();
//
// Read Part B and you have read the manual; nothing in it depends on what stands below it.
// `grep -n '^// == ' coordination.hpp` prints the table of contents.
//
//   A  Configuration    macros, version, includes
//   B  Interface        1 Errors  2 Execution  4 Transport  5 Client  6 Lease  7 Watch  8 Lock
//                       9 Election  10 Registry  11 Config  12 Coordinator  13 Globals
//                       14 MemoryEtcd  15 Recipes
//   C  Implementation   the same numbers, and 3 Wire; compiled here, or in one .cpp
//
// A call travels one way: service (8-11) -> Lease and Watch (6, 7) -> Client (5: choose a member,
// attach the token, retry where that is safe) -> Transport (4: bytes) -> etcd's JSON gateway.
//
// Time:     every call ends: when its Context says so, else after CoordinatorOptions::timeout.
//           Only acquire, campaign and Watch::next wait for as long as their Context allows.
// Errors:   nothing throws but Result::value(). A write that failed says in Error::outcome
//           whether etcd may have applied it all the same.
// Threads:  every class may be used from several threads unless it says otherwise. A Coordinator
//           runs at most 22 threads of its own, started when they are needed: 1 for timers, 3 for
//           lease renewals, 3 for second attempts, 1 for logins, 1 for background work, 1 for the
//           log, 2 for callbacks, 2 for on_lost, 2 for reading again and 6 for watch streams (more
//           where etcd has compacted what idle watches would need). Who waits for a lock or an
//           election waits on a stream of its own, in the caller's thread.
// Handlers: run on the callback threads, in order and one at a time per handle, never under a
//           lock of the library. They may call anything and may destroy their own handle. Once a
//           handle's destructor, its cancel() or the Coordinator's close() has returned, its
//           handlers run no more (unless it was called from inside one, or from a handler that
//           is itself waited for in one). What a handler throws is caught and logged; while two
//           block, the others of the same kind (on_lost is one) wait. Handlers that are set add
//           up: each is kept as long as its handle, and told.
// Handles:  move-only, and their destructors give back what they hold. One that was moved from, or
//           that a child of fork() has from its parent, holds nothing: its calls say Cancelled.
// Exit:     what was not closed is closed by exit(), before anything static is destroyed.

// == A. Configuration ===========================================================================

// Macros of X11, AssertMacros.h and Arduino that would break this file are put aside until its end.
#pragma push_macro("None")
#undef None
#pragma push_macro("Status")
#undef Status
#pragma push_macro("Debug")
#undef Debug
#pragma push_macro("Info")
#undef Info
#pragma push_macro("check")
#undef check
#pragma push_macro("verify")
#undef verify
#pragma push_macro("delay")
#undef delay

#ifndef COORDINATION_HPP
#define COORDINATION_HPP

#define COORDINATION_VERSION_MAJOR 0
#define COORDINATION_VERSION_MINOR 2
#define COORDINATION_VERSION_PATCH 0

// 1: every file that includes this header can use it at once.
// 0: Part C is compiled only where COORDINATION_IMPLEMENTATION is defined: in exactly one .cpp.
// The value must be the same in the whole program.
#ifndef COORDINATION_HEADER_ONLY
#define COORDINATION_HEADER_ONLY 1
#endif

// 0: needs neither cpp-httplib nor OpenSSL; CoordinatorOptions::transport must then be set.
#ifndef COORDINATION_USE_HTTPLIB
#define COORDINATION_USE_HTTPLIB 1
#endif

// 0: without MemoryEtcd, the etcd in memory for tests: a quarter less to compile.
#ifndef COORDINATION_MEMORY_ETCD
#define COORDINATION_MEMORY_ETCD 1
#endif

#include <cassert>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#if __has_include(<nlohmann/json_fwd.hpp>)
#include <nlohmann/json_fwd.hpp>  // who uses values of ConfigCenter includes <nlohmann/json.hpp>
#else
#include <nlohmann/json.hpp>
#endif

namespace coordination {
inline namespace v0 {

using std::chrono::milliseconds;

// == B. Interface ===============================================================================

// == 1. Errors ==================================================================================

/// What kind of thing went wrong.
enum class ErrorCode {
  Connection,        // no member could be reached
  Timeout,           // the Context's deadline, or CoordinatorOptions::timeout, has passed
  NotFound,          // no such key, lease or leader
  Conflict,          // somebody else holds it, or it has changed in the meantime
  Validation,        // the arguments are wrong; nothing was sent, or etcd refused them
  Unavailable,       // etcd is there but cannot serve now: no leader, no quorum, no space
  Cancelled,         // the Context was cancelled, or the Coordinator is closed
  PermissionDenied,  // wrong or missing credentials, or no right to this key
  Lost,              // the lock, leadership or lease is not ours any more
  Compacted,         // etcd has discarded the history that was asked for (see Error::revision)
  Internal           // an answer that makes no sense; the message names the endpoint
};

/// The code's name in errors and logs: "CONNECTION_ERROR", "TIMEOUT_ERROR", "NOT_FOUND", ...
const char* to_string(ErrorCode code);

/// Whether a write that failed can have taken effect.
enum class Outcome {
  NotApplied,   // certainly not: it may be tried again
  MaybeApplied  // nobody knows: read again before anything that must not happen twice
};

/// Why a call failed. Threads: a value, as all structs of this header.
struct Error {
  ErrorCode code{ErrorCode::Internal};
  std::string message{};                 // what could not be done
  std::string cause{};                   // why, in the words of etcd or of the system; may be empty
  Outcome outcome{Outcome::NotApplied};  // of a write
  std::int64_t revision{0};              // of Compacted: from here on the history is complete

  /// For functions of one's own that return a Result: Error::make(ErrorCode::NotFound, "no such
  /// job").
  static Error make(ErrorCode code, std::string message, std::string cause = {},
                    Outcome outcome = Outcome::NotApplied) {
    return {code, std::move(message), std::move(cause), outcome, 0};
  }
};

/// "[CODE] message: cause", in one line; without the cause if there is none.
std::string to_string(const Error& error);

/// What Result::value() throws: an Error as an exception. what() is to_string(error()).
class CoordinationError : public std::runtime_error {
 public:
  explicit CoordinationError(Error error)
      : std::runtime_error(to_string(error)), error_(std::move(error)) {}
  /// That of error().
  ErrorCode code() const { return error_.code; }
  /// All that is known: also its cause, and its outcome.
  const Error& error() const { return error_; }

 private:
  Error error_;
};

/// True if `e` is a CoordinationError.
bool is_coordination_error(const std::exception& e);

/// The code of a CoordinationError; Internal for any other exception.
ErrorCode get_error_code(const std::exception& e);

namespace detail {
[[noreturn]] void raise(const Error& error);  // throws CoordinationError; aborts without exceptions
}  // namespace detail

/// A value or an Error: what every call returns. It must be looked at, or the compiler warns. It
/// has the names of C++23's std::expected.
///   if (!result) return result.error();  use(*result);   // or, where an exception is welcome:
///   use(f().value());
template <class T>
class [[nodiscard]] Result {
 public:
  /// A success; a function that returns a Result<T> may just return a T.
  Result(T value) : value_(std::in_place, std::move(value)) {}
  /// A failure; it may just return an Error.
  Result(Error error) : error_(std::in_place, std::move(error)) {}

  /// True if there is a value.
  explicit operator bool() const { return value_.has_value(); }
  bool has_value() const { return value_.has_value(); }

  /// The value. There must be one: an assertion says so, and without assertions it is undefined.
  T& operator*() & { return *get(); }
  const T& operator*() const& { return *get(); }
  T operator*() && { return std::move(*get()); }
  T* operator->() { return get(); }
  const T* operator->() const { return get(); }

  /// The value. Errors: throws a CoordinationError if there is none (without exceptions: prints it
  /// and aborts).
  T& value() & { return demand(), *get(); }
  const T& value() const& { return demand(), *get(); }
  T value() && { return demand(), std::move(*get()); }  // by value: safe in a range-for

  /// The value, or `other` whatever the error is.
  template <class U>
  T value_or(U&& other) const& {
    return has_value() ? *get() : static_cast<T>(std::forward<U>(other));
  }
  template <class U>
  T value_or(U&& other) && {
    return has_value() ? std::move(*get()) : static_cast<T>(std::forward<U>(other));
  }

  /// Why there is no value. There must be none, as for `*`.
  const Error& error() const {
    assert(!has_value() && "error() of a Result that holds a value");
    return *error_;
  }

 private:
  T* get() {
    assert(has_value() && "* or -> of a Result that holds an error");
    return &*value_;
  }
  const T* get() const { return const_cast<Result*>(this)->get(); }
  void demand() const {
    if (!has_value()) detail::raise(error());
  }

  std::optional<T> value_;  // not a variant of both: that takes twice as long to compile
  std::optional<Error> error_;
};

/// Success or an Error: of calls that return nothing.
template <>
class [[nodiscard]] Result<void> {
 public:
  /// A success: `return {};`.
  Result() = default;
  /// A failure.
  Result(Error error) : error_(std::move(error)) {}
  /// For who does not care at which revision a write was done.
  Result(const Result<std::int64_t>& revision) {
    if (!revision) error_ = revision.error();
  }

  /// True if it was a success.
  explicit operator bool() const { return !error_; }
  bool has_value() const { return !error_; }
  /// Nothing. Errors: throws a CoordinationError if it was none.
  void value() const {
    if (error_) detail::raise(*error_);
  }
  /// Why it failed. It must have.
  const Error& error() const {
    assert(error_ && "error() of a Result that succeeded");
    return *error_;
  }

 private:
  std::optional<Error> error_;
};

// == 2. Execution ===============================================================================

namespace detail {

struct ContextState;
struct CancelHook;

Error closed_error();
/// Another number in every child of fork().
unsigned this_process();
/// Keeps for ever what another process has made: its threads are not here, and its mutexes may be
/// locked.
void bury(std::shared_ptr<void> state);

/// A state of a Coordinator that is closed.
template <class State>
const std::shared_ptr<State>& stand_in();

/// A share of a state of this process. Where there is none, since it was moved from or is another
/// process's, it stands for stand_in().
template <class State>
class Share {
 public:
  Share() = default;
  explicit Share(std::shared_ptr<State> state)
      : state_(std::move(state)), process_(this_process()) {}
  Share(const Share&) = default;
  Share(Share&&) noexcept = default;
  Share& operator=(Share other) noexcept {
    swap(other);
    return *this;
  }
  ~Share() {
    if (state_ && !mine()) bury(std::move(state_));
  }

  /// Null where there is none.
  State* mine() const { return process_ == this_process() ? state_.get() : nullptr; }
  const std::shared_ptr<State>& get() const { return mine() ? state_ : stand_in<State>(); }
  operator const std::shared_ptr<State>&() const { return get(); }
  State* operator->() const { return get().get(); }
  State& operator*() const { return *get(); }

  void swap(Share& other) noexcept {
    state_.swap(other.state_);
    std::swap(process_, other.process_);
  }

 protected:
  std::shared_ptr<State> state_;
  unsigned process_{0};
};

/// The Share of the one who owns: move-only, and let_go() is called at its end.
template <class State>
class Handle : public Share<State> {
 public:
  using Share<State>::Share;
  Handle(Handle&&) noexcept = default;
  Handle& operator=(Handle&& other) noexcept {
    Handle taken(std::move(other));
    this->swap(taken);
    return *this;
  }
  ~Handle() {
    if (this->mine()) let_go(this->state_);
  }
};

}  // namespace detail

/// How long a call may take, and a way to end it from another thread.
///
/// Copies share one state: keep a copy to cancel a call that runs elsewhere. A call whose deadline
/// passes fails with Timeout, one whose Context is cancelled with Cancelled, both at once.
class Context {
 public:
  /// Keeps a handler registered while it lives. Its destructor waits for a handler that is running
  /// in another thread.
  using Hook = std::shared_ptr<detail::CancelHook>;

  /// Neither a deadline nor cancelled.
  Context();
  /// Ends after `timeout`, from now on; at once if that is not positive; after a year at the
  /// latest.
  static Context with_timeout(milliseconds timeout);
  /// Ends at this point in time.
  static Context with_deadline(std::chrono::steady_clock::time_point deadline);
  /// A Context that ends with `parent`, or when it is itself cancelled.
  static Context child_of(const Context& parent);
  /// A Context that is cancelled when the process gets one of these signals, in whichever thread:
  /// Context::on_signals({SIGINT, SIGTERM}), of <csignal>. The first of them ends it; from then on
  /// they do what they do by default, so that a second one ends a program that hangs.
  /// Threads: one for the whole process, that never ends. Where the system has none to give, or no
  ///          pipe, the signals are left as they are.
  static Context on_signals(std::initializer_list<int> signals);

  /// Ends every call that has this Context, or a child of it.
  void cancel() const;
  /// True once cancel() was called.
  bool cancelled() const;
  /// True once it is cancelled or its deadline has passed.
  bool done() const;
  /// When it ends by itself; nothing: never.
  std::optional<std::chrono::steady_clock::time_point> deadline() const;
  /// A sleep that ends with the Context: `while (ctx.sleep_for(10s)) check();`. True: all of `time`
  /// has passed, and it goes on.
  /// Blocks: for `time`, or until the Context is done.
  bool sleep_for(milliseconds time) const;

  /// For transports: calls `handler` once, from the thread that cancels, or at once if that has
  /// happened already. A deadline that passes calls nothing.
  [[nodiscard]] Hook on_cancel(std::function<void()> handler) const;

  explicit Context(std::shared_ptr<detail::ContextState> state) : state_(std::move(state)) {}

 private:
  friend struct detail::ContextState;
  std::shared_ptr<detail::ContextState> state_;
};

/// How much a line of the log matters. Warn: it mends itself, but somebody should know. Error: it
/// does not.
enum class LogLevel { Debug, Info, Warn, Error };
/// "DEBUG", "INFO", "WARN", "ERROR".
const char* to_string(LogLevel level);

/// What a line is about: ("key", "/locks/jobs/694d"), ("cause", ...).
using LogFields = std::vector<std::pair<std::string, std::string>>;

/// Receives the library's log. Passwords, tokens and configuration values are never in it.
/// Threads: called from a thread of the Coordinator's own, a line at a time and in order, so that
///          it may block: nothing else waits for it, and close() for a second at most. Of more than
///          1000 lines that wait the rest is dropped; how many, is said. What it throws is lost.
///          It must not call back into the library.
using Logger = std::function<void(LogLevel level, std::string_view message, const LogFields&)>;

/// A Logger that writes lines of `time level message key=value ...` to standard error: the time in
/// UTC, "2031-05-07T08:09:10.123Z"; control characters as \xNN.
Logger stderr_logger(LogLevel minimum = LogLevel::Info);

/// The time by which leases, and streams that are silent, are judged. Contexts always use the real
/// steady clock. While now() throws, time goes on from what it said last.
/// Threads: now() is called from any thread, and must not block.
class Clock {
 public:
  using time_point = std::chrono::steady_clock::time_point;
  virtual ~Clock() = default;
  virtual time_point now() const = 0;
  /// Calls `wake` after every jump of time until `wake` returns false. A real clock never jumps.
  virtual void on_jump(std::function<bool()> wake) { static_cast<void>(wake); }
  /// Asks `next`, until it returns nothing, when something is to be done; no jump goes beyond.
  virtual void on_due(std::function<std::optional<time_point>()> next) { static_cast<void>(next); }
};

/// A Clock that stands still until it is told to move: for tests.
class ManualClock : public Clock {
 public:
  ManualClock();
  time_point now() const override { return read(); }
  void on_jump(std::function<bool()> wake) override { listen(std::move(wake)); }
  void on_due(std::function<std::optional<time_point>()> next) override { ask(std::move(next)); }
  /// Moves time, from one thing that is due to the next, and returns when the Coordinators on this
  /// clock have done it: renewals are answered, handlers told.
  /// Blocks: two seconds at most for what does not end (a handler, a request without an answer);
  ///         longer only where the machine has no time for anybody.
  void advance(milliseconds by);

 private:
  struct State;
  time_point read() const;
  void listen(std::function<bool()> wake);
  void ask(std::function<std::optional<time_point>()> next);
  std::shared_ptr<State> state_;
};

// == 4. Transport ===============================================================================

enum class TlsVersion { Tls12, Tls13 };

/// TLS for `https://` endpoints. Files are read and checked at connect(), and read again for each
/// new connection; if that comes to nothing (half of a pair is replaced), what was read before
/// stays in use. Where all members fail to agree with us on TLS, retry_config.max_attempts counts.
struct TlsOptions {
  std::string ca_file;       // PEM; empty = the system's certificates
  std::string cert_file;     // client certificate and key, PEM; both or none. etcd's gateway
  std::string key_file;      //   refuses a certificate with a CN while authentication is on
  bool verify_server{true};  // its CA, its dates, and the endpoint's host in its subjectAltName
  std::string ca_pem{}, cert_pem{}, key_pem{};  // the same as texts; they go before the files
  std::string key_password{};                   // of an encrypted key; nobody is asked for it
  std::string server_name{};  // to be proven by the server; empty = the host of the endpoint
  TlsVersion min_version{TlsVersion::Tls12};
};

/// How much of an answer is taken in, in bytes. A longer one is an error, and not read further.
struct LimitOptions {
  std::size_t head{65536};     // 64 KiB: status line and headers
  std::size_t body{67108864};  // 64 MiB: of an answer, or one line of a stream; unpacked
};

/// One POST to one member.
struct HttpRequest {
  std::string endpoint;  // "http://host:port" or "https://host:port"
  std::string path;      // "/v3/kv/put"
  std::vector<std::pair<std::string, std::string>> headers;  // to be sent as they are
  std::string body;
  milliseconds idle_timeout{0};  // fail when no byte came for so long; 0 = no such limit
};

struct HttpResponse {
  int status{0};
  std::string body;  // empty where the bytes went to a sink
};

/// Receives the bytes of an answer as they come; false ends the request.
using ChunkSink = std::function<bool(std::string_view bytes)>;

/// How requests reach etcd. Implement this one function to bring your own HTTP.
class Transport {
 public:
  virtual ~Transport() = default;

  /// Sends one POST and reads its answer.
  ///
  /// Without a sink the whole body is returned. With one, the body of a 2xx answer goes to it
  /// piece by piece (an end of the stream, also an early one, is then an error or a response; the
  /// caller knows how to go on), and the body of any other answer is returned. The sink may itself
  /// call perform. A request with the header `Connection: close` must be sent with it: etcd's
  /// gateway loses parts of larger bodies on persistent connections.
  /// Threads: called from many at once.
  /// Blocks:  until the answer is complete, the sink returns false, or `ctx` is done; then it
  ///          must return promptly, with Timeout or Cancelled.
  /// Errors:  outcome NotApplied only if not one byte of the request can have reached the member.
  virtual Result<HttpResponse> perform(const HttpRequest& request, const ChunkSink& sink,
                                       const Context& ctx) = 0;
  /// Whether it can be used at all; asked once, by connect().
  virtual Result<void> check() { return {}; }
  /// Whether time alone may mend that a request to `endpoint` has failed: not where the two sides
  /// do not agree on TLS.
  virtual bool may_recover(const std::string& endpoint) {
    return static_cast<void>(endpoint), true;
  }
  /// Closes what is kept open for the next request. A Coordinator that closes asks for it, unless
  /// the transport was given to it and so may be another one's, too.
  virtual void close_idle() {}
};

/// The Transport on cpp-httplib: pooled keep-alive connections, TCP_NODELAY, TLS by OpenSSL. All
/// addresses of a host are raced (RFC 8305), each for 1.5 s at most; the one that answered is the
/// first the next time.
/// Blocks: a host name is looked up by the system's resolver, which cannot be interrupted.
/// Errors: Validation where `tls` names what cannot be used; Internal where `limits` are exceeded
///         by a body; Unavailable from every request if it was built without cpp-httplib.
std::shared_ptr<Transport> make_default_transport(const TlsOptions& tls = {},
                                                  const LimitOptions& limits = {});

// == 5. Client ==================================================================================

/// How often and how fast a failed request is repeated, where that is safe: reads on any failure,
/// writes only if they were certainly not applied. The next member is tried at once; after each
/// round over all members there is a delay, with jitter. Where no member could be reached, or none
/// has a leader, the rounds go on until the call's time is over, so that a restart of etcd is no
/// error; only 1 or 0 attempts forbid that.
struct RetryConfig {
  int max_attempts{3};  // rounds in which a member has failed that was there; at least one is made
  milliseconds initial_delay{100};
  milliseconds max_delay{2000};
  double multiplier{2.0};  // of the delay, after each round
};

/// What became of one request to one member: an attempt of a call, a stream, a look at a member.
struct RequestEvent {
  std::string path;      // "/v3/kv/put"
  std::string endpoint;  // "http://host:port"
  std::chrono::microseconds duration{0};
  std::size_t bytes_sent{0};      // of the body
  std::size_t bytes_received{0};  // of the body; of a stream: in all
  int status{0};                  // of HTTP; 0 = there was no answer, see `error`
  std::optional<Error> error{};   // why not, or why a stream was cut
};

/// All that a Coordinator can be told.
struct CoordinatorOptions {
  // [http[s]://]host[:port], also [::1]:port; the port is 2379 where there is none; without a
  // scheme it is https if `tls` names a CA or a certificate, else http
  std::vector<std::string> endpoints{"localhost:2379"};
  std::string username{};      // of etcd's authentication; empty = no login
  std::string password{};      // never logged
  milliseconds timeout{5000};  // of a call whose Context has no deadline
  RetryConfig retry_config{};  // how often what fails is tried again
  TlsOptions tls{};            // for https
  LimitOptions limits{};       // of answers
  std::string key_prefix{};    // put before "/locks", "/semaphores", "/services", "/config" and
                               //   "/elections", and before nothing that Client is given; "/shop"
  Logger logger{};             // none = silent
  std::shared_ptr<Transport> transport{};  // none = make_default_transport(tls, limits)
  std::shared_ptr<Clock> clock{};          // none = the steady clock
  std::string holder{};  // who holds a lock: the value of its key; empty = "<host>:<process id>"
  // Hears of every request, when it is over: for metrics and traces. Called as the Logger is, and
  // in its thread, so that it delays nothing but the log; what it throws is lost.
  std::function<void(const RequestEvent&)> on_request{};
  // Calls of many threads go together, see Client; false = each of them is a request of its own.
  bool share_requests{true};
};

/// A key as etcd keeps it. Keys and values are bytes. Every change of the store has a number, its
/// revision, one higher than that of the change before.
struct KeyValue {
  std::string key;
  std::string value;
  std::int64_t create_revision{0};  // of the change that made it, after it was last missing
  std::int64_t mod_revision{0};     // of its last change
  std::int64_t version{0};          // how many changes since it was made; 1 = the first value
  std::int64_t lease{0};            // with which it goes; 0 = none
};

/// The `range_end` that makes a range of all keys that begin with `prefix`.
std::string prefix_range_end(std::string_view prefix);

/// None: upwards by the key, or by another target that was named.
enum class SortOrder { None, Ascend, Descend };
/// By what: the key, or a member of KeyValue.
enum class SortTarget { Key, Version, Create, Mod, Value };

/// Which keys are read.
struct RangeRequest {
  std::string key;           // the first one
  std::string range_end{};   // the first one that is not read; empty = `key` alone
  std::int64_t limit{0};     // 0 = all
  std::int64_t revision{0};  // 0 = now
  SortOrder sort_order{SortOrder::None};
  SortTarget sort_target{SortTarget::Key};
  bool serializable{false};  // true = from the member's own data, which may be old
  bool keys_only{false};     // no values; from etcd 3.7 on no leases either
  bool count_only{false};    // nothing but how many there are
  std::int64_t min_mod_revision{0}, max_mod_revision{0};        // only those; 0 = all
  std::int64_t min_create_revision{0}, max_create_revision{0};  // only those; 0 = all
};

/// What was read.
struct RangeResponse {
  std::vector<KeyValue> kvs;  // in the order that was asked for
  std::int64_t count{0};      // of all keys in the range, whatever `limit` and the filters say
  bool more{false};           // `limit` has left some out
  std::int64_t revision{0};   // of the store when it answered
};

/// What is written.
struct PutRequest {
  std::string key;
  std::string value;
  std::int64_t lease{0};     // the key goes with it; 0 = it stays
  bool prev_kv{false};       // return what was there before
  bool ignore_value{false};  // keep the value, change the lease
  bool ignore_lease{false};  // keep the lease, change the value
};

/// That it was written.
struct PutResponse {
  std::int64_t revision{0};         // of this change
  std::optional<KeyValue> prev_kv;  // if it was asked for and there was one
};

/// Which keys are removed; as for RangeRequest.
struct RemoveRequest {
  std::string key;
  std::string range_end{};
  bool prev_kv{false};  // return what was removed
};

/// What was removed. That there was nothing is no error.
struct RemoveResponse {
  std::int64_t deleted{0};         // how many
  std::vector<KeyValue> prev_kvs;  // if they were asked for
  std::int64_t revision{0};        // of this change; of the store, if there was none
};

/// A condition of a Txn. On a missing key every number is 0 and no value compares.
struct Compare {
  enum class Target { Version, Create, Mod, Value, Lease };  // the members of KeyValue
  enum class Is { Equal, Greater, Less, NotEqual };          // than `number` or `bytes`

  std::string key;
  Target target{Target::Create};
  Is is{Is::Equal};
  std::int64_t number{0};   // of the other targets
  std::string bytes{};      // of Target::Value
  std::string range_end{};  // true if it holds for all keys of the range

  // By what they compare: Compare::version("/a", Compare::Is::Equal, 1).
  static Compare create_revision(std::string key, Is is, std::int64_t revision);
  static Compare mod_revision(std::string key, Is is, std::int64_t revision);
  static Compare version(std::string key, Is is, std::int64_t version);
  static Compare lease(std::string key, Is is, std::int64_t lease);
  static Compare value(std::string key, Is is, std::string value);
  /// There is such a key.
  static Compare exists(std::string key);
  /// There is none.
  static Compare missing(std::string key);
};

struct Txn;

/// One operation of a Txn.
struct Op {
  std::variant<RangeRequest, PutRequest, RemoveRequest, std::shared_ptr<const Txn>> request;

  // As the calls of Client with these names.
  static Op range(RangeRequest request);
  static Op get(std::string key);
  static Op put(std::string key, std::string value, std::int64_t lease = 0);
  static Op put(PutRequest request);
  static Op remove(std::string key);
  static Op remove(RemoveRequest request);
  /// A Txn inside a Txn.
  static Op txn(Txn txn);
};

/// If all of `compare` hold, `success` is done, else `failure`; as one step.
struct Txn {
  std::vector<Compare> compare;
  std::vector<Op> success;
  std::vector<Op> failure;

  // Txn().when(Compare::missing("/a")).then(Op::put("/a", "1")).otherwise(Op::get("/a"))
  Txn& when(Compare c) & { return compare.push_back(std::move(c)), *this; }
  Txn& then(Op op) & { return success.push_back(std::move(op)), *this; }
  Txn& otherwise(Op op) & { return failure.push_back(std::move(op)), *this; }
  Txn&& when(Compare c) && { return std::move(when(std::move(c))); }
  Txn&& then(Op op) && { return std::move(then(std::move(op))); }
  Txn&& otherwise(Op op) && { return std::move(otherwise(std::move(op))); }
};

struct TxnResponse;
using OpResponse =
    std::variant<RangeResponse, PutResponse, RemoveResponse, std::shared_ptr<const TxnResponse>>;

/// Which branch was taken, and the answers to its operations.
struct TxnResponse {
  bool succeeded{false};              // all compares held: `success` was done, else `failure`
  std::vector<OpResponse> responses;  // one for each Op of the branch that was taken
  std::int64_t revision{0};           // of the changes, or of the store if there was none

  /// The answer of the i-th operation, which was a range or get; empty if it was not.
  const RangeResponse& range(std::size_t i) const;
};

/// What one member says of itself.
struct Status {
  std::string endpoint;             // as it was asked
  std::string version;              // "3.5.30"
  std::int64_t db_size{0};          // in bytes, with what has been freed
  std::uint64_t leader{0};          // the member that leads; 0 = none
  std::uint64_t member_id{0};       // of this one
  std::uint64_t raft_term{0};       // grows with every election of etcd's own
  std::int64_t revision{0};         // of the store, as far as this member has it
  std::vector<std::string> errors;  // "etcdserver: no leader", ...
};

/// What a request of Client::call does to etcd.
enum class Effect {
  Reads,  // nothing: it may be repeated, and answered by a member without a leader
  Writes  // perhaps something: it is never sent again once it may have been applied
};

class Lease;
class Subscription;
struct WatchEvent;
struct WatchRequest;
template <class Event>
class Watch;

namespace detail {
struct ClientState;
}  // namespace detail

/// etcd in its own vocabulary: bytes in, bytes out. Keys are taken as they are, any bytes but none
/// at all: no key_prefix is added, and none of the rules of locks and configuration holds (what a
/// lock calls "jobs" is "<key_prefix>/locks/jobs/..." here).
///
/// Blocks: each call until it is answered, or its Context or CoordinatorOptions::timeout ends it.
/// Errors: of each call Timeout, Cancelled, Connection, Unavailable, PermissionDenied; Validation
///         for an empty key, or what etcd refuses. Of a write: see Error::outcome.
///
/// It goes on to the next member when one fails, logs in, and repeats what is safe to repeat. Slow
/// is not dead: a read that is late (after a second or so) is asked for at a second member beside
/// the first, and the first answer counts; a write is never sent twice. A write for a member that
/// was not heard of for two seconds is preceded by a read, so that it is not given to a dead one;
/// where a member is silent while others answer, its calls end before their time: Unavailable.
/// The first cluster that answers is the one: an endpoint of another is never used.
///
/// Calls of many threads share requests: while eight are on their way, further get(key), put(key,
/// value) or remove(key), and those of ConfigCenter, gather, each kind for itself, and travel as
/// one Txn. Each has its own Context, and the result or error that it would have had alone; only
/// may several keys then have the same revision. Nothing is held back where nothing is on its way,
/// and nothing else is shared: put(PutRequest) always goes by itself.
/// CoordinatorOptions::share_requests turns it off.
class Client {
 public:
  /// Errors: NotFound if there is no such key.
  Result<KeyValue> get(std::string key, Context ctx = {});
  /// All keys of a range, in one answer: of many, with `limit`, page by page. None is no error.
  Result<RangeResponse> range(RangeRequest request, Context ctx = {});
  /// Writes a value, whatever is there.
  Result<PutResponse> put(std::string key, std::string value, Context ctx = {});
  /// Errors: Validation if there is a value, or lease, that is to be ignored; NotFound if there is
  ///         no key whose value, or lease, could be kept.
  Result<PutResponse> put(PutRequest request, Context ctx = {});
  /// Removes a key; RemoveResponse::deleted says whether there was one.
  Result<RemoveResponse> remove(std::string key, Context ctx = {});
  /// Removes all keys of a range, in one step.
  Result<RemoveResponse> remove(RemoveRequest request, Context ctx = {});
  /// Does all or nothing of it, in one step. It may have 128 operations (etcd's default).
  /// A Txn whose compares failed is no error: see TxnResponse::succeeded.
  Result<TxnResponse> commit(Txn txn, Context ctx = {});
  /// Discards all history before `revision`. Success if that has been done already.
  Result<void> compact(std::int64_t revision, Context ctx = {});
  /// Of the member in use.
  Result<Status> status(Context ctx = {});
  /// Any other unary request of etcd's gateway, as JSON in etcd's own form (bytes in base64, 64-bit
  /// numbers as strings, zeros left out): call("/v3/cluster/member/list", {}, Effect::Reads). It
  /// has the failover, the login and the errors of the other calls. Without an Effect it writes.
  /// Errors: Validation if `path` is none, or `body` neither an object nor null.
  Result<nlohmann::json> call(std::string path, const nlohmann::json& body, Effect effect,
                              Context ctx = {});
  Result<nlohmann::json> call(std::string path, const nlohmann::json& body, Context ctx = {});

  /// A lease that renews itself until its handle is destroyed, revoked or detached.
  /// etcd has a minimum (2 s by default): Lease::ttl() tells what was granted.
  Result<Lease> grant(milliseconds ttl, Context ctx = {});

  /// Every change of a key or range, in order, from `start_revision` or from now on.
  /// Blocks: until it has begun; what happens from then on is delivered.
  /// Errors: Compacted if etcd has discarded what came after `start_revision`.
  Result<Watch<WatchEvent>> watch(WatchRequest request, Context ctx = {});
  /// Of one key, from now on.
  Result<Watch<WatchEvent>> watch(std::string key, Context ctx = {});
  /// The same, told to a handler; see Subscription::on_end.
  Result<Subscription> watch(WatchRequest request, std::function<void(const WatchEvent&)> handler,
                             Context ctx = {});

  explicit Client(std::shared_ptr<detail::ClientState> state) : state_(std::move(state)) {}

 private:
  detail::Share<detail::ClientState> state_;
};

// == 6. Lease ===================================================================================

namespace detail {
struct LeaseState;
void let_go(const std::shared_ptr<LeaseState>& lease);
}  // namespace detail

/// A lease that is kept alive. Move-only; the destructor revokes it, and with it its keys.
///
/// It is renewed at a third of the granted TTL, together with all others in one request. It is
/// lost when etcd says so, or when TTL has passed since the last successful renewal was *sent*
/// (etcd may count from later, never from earlier).
class [[nodiscard]] Lease {
 public:
  std::int64_t id() const;
  /// The TTL that etcd has granted.
  milliseconds ttl() const;
  /// True while the lease is certainly alive. Local: no request is sent.
  bool held() const;
  /// Calls `handler` once when the lease is lost, also if that has happened already. Not after
  /// revoke or detach. A handler that is set later adds to those before.
  void on_lost(std::function<void(const Error&)> handler);
  /// What etcd says is left.
  Result<milliseconds> remaining(Context ctx = {});
  /// Renews now. Errors: Lost.
  Result<void> keep_alive_once(Context ctx = {});
  /// Ends the lease and deletes its keys. A lease that is gone already is a success.
  Result<void> revoke(Context ctx = {});
  /// Stops renewing and gives the lease up to its TTL; returns its id.
  std::int64_t detach();

  explicit Lease(std::shared_ptr<detail::LeaseState> state) : state_(std::move(state)) {}

 private:
  detail::Handle<detail::LeaseState> state_;
};

// == 7. Watch ===================================================================================

/// A key was written, or removed (by hand, or with its lease).
enum class EventType { Put, Delete };
const char* to_string(EventType type);  // "PUT", "DELETE"

/// One change of one key.
struct WatchEvent {
  EventType type{EventType::Put};
  KeyValue kv;                      // of a Delete: the key and the revision that removed it
  std::optional<KeyValue> prev_kv;  // if it was asked for and there was one
  std::int64_t revision{0};         // of the change; those of one Txn have the same
};

/// What Client::watch is to watch.
struct WatchRequest {
  std::string key;
  std::string range_end{};               // empty = this key alone
  std::int64_t start_revision{0};        // 0 = from now on; else from this one on, it included
  bool prev_kv{false};                   // with what was there before
  bool no_put{false}, no_delete{false};  // without events of that kind
  std::size_t queue_size{1024};          // see Watch
};

/// How registry and configuration watch.
struct WatchOptions {
  bool include_existing{false};  // begin with a Put for all that is there, the oldest first
  std::size_t queue_size{1024};  // see Watch
};

namespace detail {
template <class Event>
class EventSource {
 public:
  virtual ~EventSource() = default;
  virtual Result<Event> next(const Context& ctx) = 0;
  virtual void cancel() = 0;
};
template <class Event>
void let_go(const std::shared_ptr<EventSource<Event>>& source) {
  source->cancel();
}
}  // namespace detail

/// Events, one after the other: in order, each once, none left out, whatever happens to the
/// connection. Move-only.
///
/// All watches of a Coordinator share a few streams. When `queue_size` events wait for a reader
/// that sleeps (or more of them, a megabyte, for one that is slow) this watch rests after what has
/// come in one piece, and goes on from where it stopped when they have been read.
/// Threads: one reader at a time; cancel() from any thread.
template <class Event>
class [[nodiscard]] Watch {
 public:
  class iterator;

  /// Blocks: until there is an event or `ctx` is done.
  /// Errors: Timeout and Cancelled of `ctx` end nothing, call again. Cancelled after cancel() and
  ///         close(). Compacted only from Client::watch: events are missing, the watch has ended.
  ///         PermissionDenied ends it, too.
  Result<Event> next(Context ctx = {}) {
    auto* source = source_.mine();
    return source ? source->next(ctx) : detail::closed_error();
  }

  /// For (auto& event : watch): until the watch ends.
  iterator begin() { return iterator(this); }
  iterator end() { return iterator(); }

  /// Ends the watch and wakes its reader.
  void cancel() {
    if (auto* source = source_.mine()) source->cancel();
  }

  explicit Watch(std::shared_ptr<detail::EventSource<Event>> source) : source_(std::move(source)) {}

 private:
  detail::Handle<detail::EventSource<Event>> source_;
};

/// An input iterator: each step waits for the next event. Threads: as next().
template <class Event>
class Watch<Event>::iterator {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = Event;
  using difference_type = std::ptrdiff_t;
  using pointer = Event*;
  using reference = Event&;

  iterator() = default;
  explicit iterator(Watch* watch) : watch_(watch) { ++*this; }
  reference operator*() { return **event_; }
  pointer operator->() { return &**event_; }
  iterator& operator++() {
    event_ = std::make_shared<Result<Event>>(watch_->next());
    if (!*event_) watch_ = nullptr;
    return *this;
  }
  void operator++(int) { ++*this; }
  bool operator==(const iterator& other) const { return watch_ == other.watch_; }
  bool operator!=(const iterator& other) const { return watch_ != other.watch_; }

 private:
  Watch* watch_{nullptr};
  std::shared_ptr<Result<Event>> event_;
};

namespace detail {
class SubscriptionState {
 public:
  virtual ~SubscriptionState() = default;
  virtual void cancel() = 0;
  virtual void on_end(std::function<void(const Error&)> handler) = 0;
};
inline void let_go(const std::shared_ptr<SubscriptionState>& state) { state->cancel(); }
}  // namespace detail

/// A handler that is called with events. Move-only; after its destructor no handler runs.
class [[nodiscard]] Subscription {
 public:
  /// Of nothing: to be assigned to.
  Subscription() = default;

  /// Called once, after the last event, when the watch ends though nobody has cancelled it (also
  /// when that was before on_end()): Compacted, of Client::watch only: etcd has discarded events
  /// that it has not had; PermissionDenied. Threads: as the handler of the events.
  void on_end(std::function<void(const Error&)> handler) {
    if (auto* state = state_.mine()) state->on_end(std::move(handler));
  }

  /// Ends it before its destructor does. Blocks: until a handler that is running in another thread
  /// has returned.
  void cancel() {
    if (auto* state = state_.mine()) state->cancel();
  }

  explicit Subscription(std::shared_ptr<detail::SubscriptionState> state)
      : state_(std::move(state)) {}

 private:
  detail::Handle<detail::SubscriptionState> state_;
};

// == 8. Lock ====================================================================================

namespace detail {

struct CoordinatorState;
void let_go(const std::shared_ptr<CoordinatorState>& state);
struct OwnedKey;
void let_go(const std::shared_ptr<OwnedKey>& owned);

template <class T>
struct AsResult {
  using Type = Result<T>;
};
template <class T>
struct AsResult<Result<T>> {
  using Type = Result<T>;
};
template <class Fn, class Argument>
using ResultOf = typename AsResult<std::decay_t<std::invoke_result_t<Fn, Argument>>>::Type;

template <class Fn, class Argument>
ResultOf<Fn, Argument&> call(Fn&& fn, Argument& argument) {
  if constexpr (std::is_void_v<std::invoke_result_t<Fn, Argument&>>) {
    return std::forward<Fn>(fn)(argument), Result<void>();
  } else {
    return std::forward<Fn>(fn)(argument);
  }
}

}  // namespace detail

/// What Lock and Leadership have in common: a key in etcd that is ours as long as its lease lives.
/// Move-only.
///
/// It renews itself at a third of the granted TTL until it is given up. It is lost when its lease
/// is gone, when somebody deletes its key, or when TTL has passed since the last successful
/// renewal was sent; then renewing stops, the lease is revoked and on_lost is told, once.
///
/// A lock on a lease cannot stop a holder that does not notice the time (a paused process, a
/// request in flight). What must not be written by two holders needs the fencing token: in etcd
/// write with put(), remove() or commit() of this class or add guard() to a Txn; elsewhere let
/// the resource refuse a token lower than the highest it has seen.
class [[nodiscard]] HeldKey {
 public:
  /// The key that this holder owns: `<key_prefix>/locks/<key>/<lease in hex>`. Two locks in turn
  /// may have the same one, since a lease is used again; only the token differs.
  const std::string& key() const;
  /// Greater for every later holder of the same lock or office: the create revision of key().
  std::int64_t fencing_token() const;
  /// True while the key is certainly ours. Local: no request is sent.
  bool held() const;
  /// Calls `handler` once when the key is lost, also if that has happened already. Not after
  /// it was given up. A handler that is set later adds to those before; all of them live as long
  /// as this handle. No other handlers delay it but those of other losses.
  void on_lost(std::function<void(const Error&)> handler);
  /// True in a Txn exactly while the key is ours.
  Compare guard() const;

  /// Writes that take place only while the key is ours. Errors: Lost if it was not.
  Result<PutResponse> put(std::string key, std::string value, Context ctx = {});
  Result<RemoveResponse> remove(std::string key, Context ctx = {});
  /// `txn` as Client::commit does it, inside the guard. One with compares of its own is nested in
  /// the guard's, and may have one operation less than etcd allows (128 by default).
  /// Errors: Lost if the guard did not hold; then nothing was done.
  Result<TxnResponse> commit(Txn txn, Context ctx = {});

  explicit HeldKey(std::shared_ptr<detail::OwnedKey> state) : state_(std::move(state)) {}

 protected:
  detail::Handle<detail::OwnedKey> state_;
};

/// A lock that is held: exclusive, shared, or a permit of a semaphore. The destructor unlocks.
/// Blocks: the destructors of a Coordinator's handles and its close() for a second altogether while
///         etcd does not answer; then it is done in the background, or by the TTL. Also until a
///         handler of on_lost that is running in another thread has returned; who is waited for
///         is logged after ten seconds.
class [[nodiscard]] Lock : public HeldKey {
 public:
  using HeldKey::HeldKey;

  /// Deletes key(), nobody else's.
  /// Errors: Lost if it was gone; Validation if it was unlocked before. After any other error the
  ///         lock is given up all the same, in the background or by its TTL; MaybeApplied: the key
  ///         is gone, but nobody can tell whether it was ours until then.
  Result<void> unlock(Context ctx = {});
  /// Renews now and from then on with `ttl`. If it differs from the present one, key() moves to a
  /// new lease and keeps its place and its token. Errors: Lost.
  Result<void> renew(milliseconds ttl, Context ctx = {});
  /// What is left, as etcd says. Errors: Lost.
  Result<milliseconds> ttl(Context ctx = {});
};

/// Who holds a lock or an office.
struct LockHolder {
  std::string key;           // empty: nobody
  std::string value;         // who it is, see CoordinatorOptions::holder; of an office: what the
                             //   leader has proclaimed
  std::int64_t token{0};     // its fencing token: the revision since which it stands there
  std::int64_t revision{0};  // of etcd, when this was so
  bool exists() const { return !key.empty(); }
};

/// A counting semaphore: at most `permits` holders, first come, first served.
class [[nodiscard]] Semaphore {
 public:
  /// Blocks: until there is a permit or `ctx` is done, as DistributedLock::acquire.
  /// Errors: Conflict if another user of the key says another number of permits; it names both.
  Result<Lock> acquire(milliseconds ttl, Context ctx = {});
  /// Errors: Conflict if there is none.
  Result<Lock> try_acquire(milliseconds ttl, Context ctx = {});

  Semaphore(std::shared_ptr<detail::CoordinatorState> state, std::string key, int permits)
      : state_(std::move(state)), key_(std::move(key)), permits_(permits) {}

 private:
  detail::Share<detail::CoordinatorState> state_;
  std::string key_;
  int permits_;
};

class Slot;  // of section 15

/// Locks by name. First come, first served, and in one queue with `etcdctl lock /locks/<key>` and
/// Go's concurrency.Mutex.
///
/// A key is one or more segments joined by '/', without one at its ends; an empty segment, `.` or
/// `..` is Validation (unlike keys of Client, which may be anything), and so is a TTL that is not
/// positive. In etcd it is `<key_prefix>/locks/<key>/<lease>`. etcd grants whole seconds and has a
/// minimum (2 s by default); the TTL is rounded up.
class DistributedLock {
 public:
  /// Blocks: until the lock is ours or `ctx` is done, also through an outage of etcd; whose place
  ///         in the queue is lost in one stands at its end again. A call that fails leaves nothing
  ///         behind.
  /// Errors: Timeout and Cancelled name who holds it, or why etcd could not be asked.
  Result<Lock> acquire(std::string key, milliseconds ttl, Context ctx = {});
  /// Errors: Conflict if somebody holds it.
  Result<Lock> try_acquire(std::string key, milliseconds ttl, Context ctx = {});
  /// A lock that any number of shared holders have together, but none beside an exclusive one.
  /// Blocks and Errors: as acquire.
  Result<Lock> acquire_shared(std::string key, milliseconds ttl, Context ctx = {});
  /// Errors: Conflict if it has an exclusive holder, or one is waiting before us.
  Result<Lock> try_acquire_shared(std::string key, milliseconds ttl, Context ctx = {});
  /// Who holds it now (of shared holders the first). Errors: NotFound if nobody does.
  Result<LockHolder> holder(std::string key, Context ctx = {});
  /// Keys: `<key_prefix>/semaphores/<key>/`. All users of a key must agree on `permits`.
  Semaphore semaphore(std::string key, int permits);

  /// Acquires, calls `fn(lock)` and unlocks. What `fn` returns (nothing, a value, a Result) is
  /// returned as a Result; if that is an error, it is the error.
  /// Errors: those of acquire, then `fn` was not called; Lost if the lock was lost before `fn` had
  ///         returned. A release that needs more time goes on in the background.
  template <class Fn>
  detail::ResultOf<Fn, Lock&> with_lock(std::string key, milliseconds ttl, Fn&& fn,
                                        Context ctx = {}) {
    auto lock = acquire(std::move(key), ttl, std::move(ctx));
    if (!lock) return lock.error();
    auto result = detail::call(std::forward<Fn>(fn), *lock);
    auto unlocked = lock->unlock();
    bool lost = !unlocked && unlocked.error().code == ErrorCode::Lost;
    if (result && lost) return unlocked.error();
    return result;
  }

  /// A number from 0 to `count` - 1 that nobody else has while the handle is held: for workers that
  /// need an id of their own. It is the lock `<name>/<number>`, any that is free.
  /// Errors: Conflict if all are taken; it does not wait. Validation if `count` is not positive.
  Result<Slot> lease_slot(std::string name, int count, milliseconds ttl, Context ctx = {});

  explicit DistributedLock(std::shared_ptr<detail::CoordinatorState> state)
      : state_(std::move(state)) {}

 private:
  detail::Share<detail::CoordinatorState> state_;
};

// == 9. Election ================================================================================

/// Who leads.
using LeaderInfo = LockHolder;

/// An office that is held. The destructor resigns, and blocks as that of Lock does.
class [[nodiscard]] Leadership : public HeldKey {
 public:
  using HeldKey::HeldKey;

  /// Announces a new value; returns the revision. Errors: Lost.
  Result<std::int64_t> proclaim(std::string value, Context ctx = {});
  /// Errors: Lost if the office was gone; Validation if it was given up before.
  Result<void> resign(Context ctx = {});
};

/// Elections by name, which is as a lock's key, under `<key_prefix>/elections/<name>`; candidates
/// of `etcdctl elect` and Go's concurrency.Election on that prefix stand in the same queue.
class Election {
 public:
  /// Blocks: until this candidate leads or `ctx` is done, as DistributedLock::acquire. A call that
  ///         fails leaves nothing behind.
  Result<Leadership> campaign(std::string name, std::string value, milliseconds ttl,
                              Context ctx = {});
  /// Errors: NotFound if nobody leads.
  Result<LeaderInfo> leader(std::string name, Context ctx = {});
  /// The leader now, or "nobody", and then every other leader or value, also "nobody".
  Result<Watch<LeaderInfo>> observe(std::string name, Context ctx = {});
  /// The same, told to a handler.
  Result<Subscription> observe(std::string name, std::function<void(const LeaderInfo&)> handler,
                               Context ctx = {});

  /// Campaigns, calls `fn(leadership, office)` while we lead, and resigns. `office` is a Context
  /// that ends with `ctx`, and when the office is lost: then `fn` must return, and this campaigns
  /// again. What `fn` returns (nothing, or a Result<void>) while the office is ours is returned.
  /// Blocks: in the caller's thread, until `fn` has returned in office, or `ctx` is done.
  /// Errors: those of campaign and of `fn`. What `fn` throws is passed on, after resigning.
  template <class Fn>
  Result<void> lead(std::string name, std::string value, milliseconds ttl, Fn&& fn,
                    Context ctx = {});

  explicit Election(std::shared_ptr<detail::CoordinatorState> state) : state_(std::move(state)) {}

 private:
  detail::Share<detail::CoordinatorState> state_;
};

// == 10. Registry ===============================================================================

/// One instance of a service. In etcd: `<key_prefix>/services/<name>/<id>`, as JSON.
struct ServiceInfo {
  std::string id;                                 // of this instance: "pay-1"
  std::string name;                               // of the service: "payments"
  std::string address;                            // where it is reached: a host or an IP
  int port{0};                                    // 1-65535
  std::map<std::string, std::string> metadata{};  // whatever callers need to know: {"zone", "a"}
  milliseconds ttl{30000};                        // how long the record outlives its process

  /// ServiceInfo::named("payments").with_id("pay-1").at("10.0.0.7", 8080): name and id cannot be
  /// mixed up, as they can in ServiceInfo{"pay-1", "payments", ...}.
  static ServiceInfo named(std::string name) {
    ServiceInfo service;
    service.name = std::move(name);
    return service;
  }
  /// The same with an id, and with an address.
  ServiceInfo with_id(std::string value) && { return id = std::move(value), std::move(*this); }
  ServiceInfo at(std::string host, int at_port) && {
    address = std::move(host);
    port = at_port;
    return std::move(*this);
  }
};

/// All members are equal.
bool operator==(const ServiceInfo& a, const ServiceInfo& b);
bool operator!=(const ServiceInfo& a, const ServiceInfo& b);

/// An instance has come, has changed or has gone.
struct ServiceEvent {
  EventType type{EventType::Put};
  ServiceInfo service;                              // of a Delete: the last record
  std::chrono::system_clock::time_point timestamp;  // when it was received
  std::int64_t revision{0};                         // of the change in etcd
};

/// What becomes of a registration whose record has vanished from etcd.
enum class HealPolicy {
  Restore,    // it is made again
  NotifyOnly  // the handler is told, and it stays away
};

/// How a registration stands; told to RegisterOptions::on_event at each change.
enum class RegistrationEvent {
  Registered,  // the record is in etcd (again)
  Lost,        // it is gone: lease lost, key deleted, or etcd lost its data
  Replaced     // somebody else has registered the same name and id; ours gives way
};
/// "REGISTERED", "LOST", "REPLACED".
const char* to_string(RegistrationEvent event);

/// How a service is registered.
struct RegisterOptions {
  HealPolicy heal{HealPolicy::Restore};
  // On a callback thread, in order, until the registration ends.
  std::function<void(RegistrationEvent, const ServiceInfo&)> on_event{};
};

namespace detail {
struct ViewCore;
class RegistrationState;
void let_go(const std::shared_ptr<RegistrationState>& registration);
void let_go(const std::shared_ptr<ViewCore>& view);
}  // namespace detail

/// A registration that ends with its handle. Move-only; the destructor unregisters.
/// Blocks: the destructor as Lock's, and until a handler of on_event has returned.
class [[nodiscard]] Registration {
 public:
  /// As ServiceRegistry's, of this one. Errors: NotFound once it has ended.
  Result<std::int64_t> update(std::map<std::string, std::string> metadata, Context ctx = {});
  /// Ends it before its destructor does, and says whether that has been done.
  Result<std::int64_t> unregister(Context ctx = {});

  explicit Registration(std::shared_ptr<detail::RegistrationState> state)
      : state_(std::move(state)) {}

 private:
  detail::Handle<detail::RegistrationState> state_;
};

/// What ServiceView and ConfigView have in common: a copy of what is in etcd, kept up to date.
/// Move-only.
class [[nodiscard]] LiveView {
 public:
  /// The revision that all of it stands for.
  std::int64_t revision() const;
  /// Blocks: until the view shows a change of this revision or a later one; for one's own writes,
  ///         which return it. Without a deadline for CoordinatorOptions::timeout.
  Result<void> wait_for(std::int64_t revision, Context ctx = {}) const;
  /// True while a stream to etcd is open; false = what is shown may be old.
  bool connected() const;
  /// How long ago etcd was last heard of; zero while connected.
  milliseconds age() const;
  /// Calls `handler` after every change; several changes may be told in one call. At first also
  /// for those that came before it was set. A handler that is set later adds to those before; all
  /// of them live as long as this handle.
  void on_change(std::function<void()> handler);
  /// Called once when the view stands still for good though nobody has closed it (also when that
  /// was before on_end()): PermissionDenied. Threads: as the handlers of on_change.
  void on_end(std::function<void(const Error&)> handler);

  explicit LiveView(std::shared_ptr<detail::ViewCore> core) : core_(std::move(core)) {}

 protected:
  detail::Handle<detail::ViewCore> core_;
};

/// The instances of one service, for who calls it: no request is sent to know whom to call.
class [[nodiscard]] ServiceView : public LiveView {
 public:
  enum class Pick { RoundRobin, Random };
  using LiveView::LiveView;

  /// All instances at one revision, by id. Local: no request is sent.
  std::vector<ServiceInfo> instances() const;
  /// One of them, in turn or at random. Local. Errors: NotFound if there is none.
  Result<ServiceInfo> pick(Pick how = Pick::RoundRobin);
  /// One of those that `matches`.
  Result<ServiceInfo> pick(std::function<bool(const ServiceInfo&)> matches);
  /// Which one is wanted; each member that is set narrows it down.
  struct PickOptions {
    Pick how{Pick::RoundRobin};
    std::function<bool(const ServiceInfo&)> matches{};  // only those
    // How often, one beside the other: at random. 0 or less: never.
    std::function<double(const ServiceInfo&)> weight{};
    std::string zone{};  // those whose metadata["zone"] it is, as long as there are any
  };
  Result<ServiceInfo> pick(const PickOptions& options);
  /// For the caller of an instance that did not answer: it is not picked for `rest` (0: again from
  /// now on), unless all that could be picked are resting. Of this view alone.
  void report_failure(const std::string& id, milliseconds rest = milliseconds(10000));
};

/// Services by name. A name or id is one segment: not empty, no '/', not `.` or `..`.
class ServiceRegistry {
 public:
  /// Registers, also over the record of somebody else, who gives way; returns the revision. The
  /// record stays until unregister or close, and comes back by itself (see HealPolicy), but never
  /// over another's: one that was replaced comes back when that has gone. Registered again by this
  /// Coordinator, it has the new options in place of the old ones.
  /// Errors: Validation also for an empty address, a port outside 1-65535, a TTL <= 0.
  Result<std::int64_t> register_service(ServiceInfo service, Context ctx = {}) {
    return register_service(std::move(service), RegisterOptions{}, std::move(ctx));
  }
  /// The same with options.
  Result<std::int64_t> register_service(ServiceInfo service, RegisterOptions options,
                                        Context ctx = {});
  /// The same, until the handle is destroyed. Each handle is a registration of its own: the later
  /// one replaces the earlier, as another process would.
  Result<Registration> register_scoped(ServiceInfo service, RegisterOptions options = {},
                                       Context ctx = {});
  /// Gives every registration with this id that this Coordinator has made other metadata, without
  /// a moment of absence; returns the (last) revision. No event is told. What is another's by now
  /// stays as it is. Errors: NotFound if there is none, or somebody else has replaced it.
  Result<std::int64_t> update(std::string id, std::map<std::string, std::string> metadata,
                              Context ctx = {});
  /// Ends every registration with this id that this Coordinator has made, and deletes its record,
  /// nobody else's; returns the (last) revision. Errors: NotFound if there is none.
  Result<std::int64_t> unregister(std::string id, Context ctx = {});

  /// The instances of a service, by id. Records that cannot be read are skipped and logged.
  Result<std::vector<ServiceInfo>> discover(std::string name, Context ctx = {});

  /// Every change from now on. A Coordinator that cannot follow (compaction) reads again and
  /// delivers the difference.
  Result<Watch<ServiceEvent>> watch(std::string name, WatchOptions options, Context ctx = {});
  Result<Watch<ServiceEvent>> watch(std::string name, Context ctx = {}) {
    return watch(std::move(name), WatchOptions{}, std::move(ctx));
  }
  /// The same, told to a handler: on a callback thread, one at a time, until the Subscription ends.
  Result<Subscription> watch(std::string name, std::function<void(const ServiceEvent&)> handler,
                             Context ctx = {}) {
    return watch(std::move(name), std::move(handler), WatchOptions{}, std::move(ctx));
  }
  Result<Subscription> watch(std::string name, std::function<void(const ServiceEvent&)> handler,
                             WatchOptions options, Context ctx = {});
  /// A local copy of all instances that is kept up to date. Blocks: until it is there.
  Result<ServiceView> view(std::string name, Context ctx = {});

  explicit ServiceRegistry(std::shared_ptr<detail::CoordinatorState> state)
      : state_(std::move(state)) {}

 private:
  detail::Share<detail::CoordinatorState> state_;
};

// == 11. Config =================================================================================

/// A value was set, or removed. A template, so that nlohmann/json need not be complete here.
template <class Json>
struct BasicConfigEvent {
  EventType type{EventType::Put};
  std::string key;                                  // as given to set(), without the key_prefix
  Json value;                                       // of a Delete: null
  std::chrono::system_clock::time_point timestamp;  // when it was received
  std::int64_t revision{0};                         // of the change in etcd
};
using ConfigEvent = BasicConfigEvent<nlohmann::json>;

/// A value, and when it was changed last.
template <class Json>
struct BasicConfigEntry {
  std::string key;  // as given to set()
  Json value;
  std::int64_t revision{0};  // of its last change: what compare_and_set expects
};
using ConfigEntry = BasicConfigEntry<nlohmann::json>;

namespace detail {

Error conversion_error(const std::string& key, std::string wanted, const char* found);

/// A number (or bool) as it is, or not at all: nothing is cut off.
template <class T, class Json>
std::optional<T> exact(const Json& json) {
  using Limits = std::numeric_limits<T>;
  if constexpr (std::is_same_v<T, bool>) {
    if (json.is_boolean()) return json.template get<bool>();
  } else if constexpr (std::is_floating_point_v<T>) {
    double number = json.is_number() ? json.template get<double>() : Limits::infinity();
    if (number >= Limits::lowest() && number <= (Limits::max)()) return static_cast<T>(number);
  } else if (json.is_number_integer()) {
    auto number = json.template get<std::int64_t>();
    bool fits = json.is_number_unsigned() || number >= 0
                    ? json.template get<std::uint64_t>() <= std::uint64_t{(Limits::max)()}
                    : std::is_signed_v<T> && number >= std::int64_t(Limits::lowest());
    if (fits) return static_cast<T>(number);
  }
  return std::nullopt;
}

template <class T>
std::string wanted() {
  using Limits = std::numeric_limits<T>;
  if (std::is_same_v<T, bool>) return "true or false";
  if (std::is_floating_point_v<T>) return "a number of " + std::to_string(sizeof(T)) + " bytes";
  return "an integer from " + std::to_string(Limits::lowest()) + " to " +
         std::to_string((Limits::max)());
}

/// A JSON value as a T.
template <class T, class Json>
Result<T> convert(const Json& json, const std::string& key) {
  if constexpr (std::is_same_v<T, Json>) {
    return json;
  } else if constexpr (std::is_arithmetic_v<T>) {
    auto number = exact<T>(json);
    if (number) return *number;
    const char* found = json.is_number_float() ? "number with a fraction" : json.type_name();
    return conversion_error(key, wanted<T>(), found);
  } else if constexpr (std::is_same_v<T, std::string>) {
    if (json.is_string()) return json.template get<std::string>();
    return conversion_error(key, "a string", json.type_name());
  } else {
#if defined(__cpp_exceptions) || defined(__EXCEPTIONS) || defined(_CPPUNWIND)
    try {
      return json.template get<T>();
    } catch (const std::exception& e) {
      return conversion_error(key, "of the type that was asked for", e.what());
    }
#else
    static_assert(std::is_void_v<T>, "without exceptions: bool, numbers, std::string, json");
#endif
  }
}

}  // namespace detail

/// The configuration under a prefix.
class [[nodiscard]] ConfigView : public LiveView {
 public:
  using LiveView::LiveView;

  /// Local: no request is sent. Errors: NotFound.
  Result<nlohmann::json> get(const std::string& key) const;
  /// The same with its revision.
  Result<ConfigEntry> get_entry(const std::string& key) const;
  /// As ConfigCenter::get_as. For one value that is read often see LiveConfig.
  template <class T, class Self = ConfigView>
  Result<T> get_as(const std::string& key) const {
    auto json = static_cast<const Self&>(*this).get(key);
    if (!json) return json.error();
    return detail::convert<T>(*json, key);
  }
  /// All keys that there are, in order.
  std::vector<std::string> keys() const;
};

/// Configuration by key, under `<key_prefix>/config/<key>`. Keys are as for DistributedLock.
///
/// Any JSON value comes back as it went in. In etcd a string stands as it is, as the Go module
/// writes it, unless its text would parse as JSON: then it is quoted. Bytes that are no JSON read
/// back as a string.
class ConfigCenter {
 public:
  /// The value, asked for at etcd: for what is read often see view() and LiveConfig.
  /// Errors: NotFound.
  Result<nlohmann::json> get(std::string key, Context ctx = {});
  /// The same with its revision, for compare_and_set.
  Result<ConfigEntry> get_entry(std::string key, Context ctx = {});
  /// As a C++ type: a number, bool or string exactly, another type as nlohmann/json converts it
  /// (without exceptions there are no others).
  /// Errors: Validation if the value is not of that type, or a number is out of its range.
  template <class T, class Self = ConfigCenter>  // a Self: so that json need not be complete here
  Result<T> get_as(std::string key, Context ctx = {}) {
    auto json = static_cast<Self&>(*this).get(key, std::move(ctx));
    if (!json) return json.error();
    return detail::convert<T>(*json, key);
  }

  /// Writes the value, whatever is there. Returns the revision. Where the answer was lost and the
  /// key has the value, that is a success. Errors: Validation if a string in it is not UTF-8, or it
  /// is over etcd's limit of 1.5 MiB.
  Result<std::int64_t> set(std::string key, const nlohmann::json& value, Context ctx = {});
  /// Writes only if the key was last changed at `expected_revision` (0 = must not exist); returns
  /// the new revision. Errors: Conflict if it was not.
  Result<std::int64_t> compare_and_set(std::string key, std::int64_t expected_revision,
                                       const nlohmann::json& value, Context ctx = {});
  /// Changes a value whoever else changes it meanwhile: calls `fn(value)`, null where there is
  /// none, and writes what that has made of it if nobody was faster; else again, after a pause.
  /// `fn` returns nothing, or a Result<void>; an error ends it. Returns the revision; of what `fn`
  /// leaves as it was, that one.
  ///   c.config().update("jobs/done", [](nlohmann::json& n) { n = n.is_null() ? 1 : n.get<int>() +
  ///   1; });
  /// Errors: MaybeApplied where the answer was lost and the key has changed; Timeout also where
  ///         others were faster all the time.
  template <class Fn>
  Result<std::int64_t> update(std::string key, Fn&& fn, Context ctx = {}) {
    using Returned = detail::ResultOf<Fn, nlohmann::json&>;
    static_assert(std::is_same_v<Returned, Result<void>>,
                  "fn changes its argument, a json&, and returns nothing or a Result<void>");
    auto change = [&fn](nlohmann::json& value) { return detail::call(fn, value); };
    return update_with(std::move(key), change, std::move(ctx));
  }
  /// Returns the revision. Errors: NotFound. Where the answer was lost nobody can tell who has
  /// removed a key that is gone: MaybeApplied.
  Result<std::int64_t> remove(std::string key, Context ctx = {});
  /// The keys under `prefix` + '/', and `prefix` itself, in order; "" = all. A user who may not
  /// read all from `prefix` to what is under it sees only the latter; so do watch_prefix and view.
  Result<std::vector<std::string>> list(std::string prefix, Context ctx = {});

  /// Every change of one key from now on. After a compaction: as ServiceRegistry::watch.
  Result<Watch<ConfigEvent>> watch(std::string key, WatchOptions options, Context ctx = {});
  Result<Watch<ConfigEvent>> watch(std::string key, Context ctx = {});
  /// The same, told to a handler: as ServiceRegistry::watch.
  Result<Subscription> watch(std::string key, std::function<void(const ConfigEvent&)> handler,
                             Context ctx = {}) {
    return watch(std::move(key), std::move(handler), WatchOptions{}, std::move(ctx));
  }
  Result<Subscription> watch(std::string key, std::function<void(const ConfigEvent&)> handler,
                             WatchOptions options, Context ctx = {});
  /// Every change of what list(prefix) lists.
  Result<Watch<ConfigEvent>> watch_prefix(std::string prefix, WatchOptions options,
                                          Context ctx = {});
  Result<Watch<ConfigEvent>> watch_prefix(std::string prefix, Context ctx = {});
  Result<Subscription> watch_prefix(std::string prefix,
                                    std::function<void(const ConfigEvent&)> handler,
                                    Context ctx = {}) {
    return watch_prefix(std::move(prefix), std::move(handler), WatchOptions{}, std::move(ctx));
  }
  Result<Subscription> watch_prefix(std::string prefix,
                                    std::function<void(const ConfigEvent&)> handler,
                                    WatchOptions options, Context ctx = {});
  /// A local copy of what list(prefix) lists, kept up to date. Blocks: until it is there.
  Result<ConfigView> view(std::string prefix, Context ctx = {});

  explicit ConfigCenter(std::shared_ptr<detail::CoordinatorState> state)
      : state_(std::move(state)) {}

 private:
  Result<std::int64_t> update_with(std::string key,
                                   const std::function<Result<void>(nlohmann::json&)>& change,
                                   Context ctx);
  detail::Share<detail::CoordinatorState> state_;
};

// == 12. Coordinator ============================================================================

/// CoordinatorOptions{}: localhost:2379, no login, 5 s, 3 attempts. See also options_from_env().
CoordinatorOptions default_coordinator_options();

/// What connect() looks at first; nothing is sent. Errors: Validation, with the option that is
/// wrong.
Result<void> validate(const CoordinatorOptions& options);

/// The three services and the election over one etcd cluster: one object is enough for a whole
/// program. Move-only; the destructor closes.
class [[nodiscard]] Coordinator {
 public:
  /// Checks the options, tries every endpoint until one answers, and logs in.
  /// Errors: Validation; PermissionDenied; Connection, Timeout or Unavailable if no member served.
  static Result<Coordinator> connect(CoordinatorOptions options = default_coordinator_options(),
                                     Context ctx = {});
#if COORDINATION_MEMORY_ETCD
  /// A Coordinator over a new MemoryEtcd: no server is needed, and nothing outlives the process.
  static Coordinator in_memory();
#endif

  // The services. Copies of them may outlive the Coordinator; after a move they are the new one's.
  DistributedLock& lock() & { return lock_; }
  ServiceRegistry& registry() & { return registry_; }
  ConfigCenter& config() & { return config_; }
  Election& election() & { return election_; }
  Client& client() & { return client_; }
  // A temporary would be closed before what it made is used.
  DistributedLock& lock() && = delete;
  ServiceRegistry& registry() && = delete;
  ConfigCenter& config() && = delete;
  Election& election() && = delete;
  Client& client() && = delete;

  /// Gives back all locks, leaderships and registrations, ends all watches and calls, joins its
  /// threads and closes its connections. Handles that still exist answer Cancelled from then on.
  /// May be repeated: all but those who call it from a handler of this Coordinator wait.
  /// Blocks: a second at most, whatever the network does; leases not revoked by then expire. Only
  ///         a handler of the user's that does not return is waited for longer, and logged after
  ///         ten seconds.
  Result<void> close();

  explicit Coordinator(std::shared_ptr<detail::CoordinatorState> state);

 private:
  detail::Handle<detail::CoordinatorState> state_;
  DistributedLock lock_;
  ServiceRegistry registry_;
  ConfigCenter config_;
  Election election_;
  Client client_;
};

// == 13. Globals ================================================================================

/// For the default Coordinator that the functions below share; it is made at first use.
/// Errors: Conflict while there is one: close() it first.
Result<void> set_default_options(CoordinatorOptions options);
/// Errors: those of Coordinator::connect; a later call tries again.
Result<std::shared_ptr<Coordinator>> default_coordinator(Context ctx = {});
/// Closes the default Coordinator, if there is one; the next use makes a new one.
Result<void> close();

// As the members of DistributedLock, ServiceRegistry and ConfigCenter with these names. Connecting
// counts as part of the call, within its Context or CoordinatorOptions::timeout.

/// DistributedLock::acquire. Blocks: until the lock is ours or `ctx` is done.
Result<Lock> acquire_lock(std::string key, milliseconds ttl, Context ctx = {});
/// DistributedLock::try_acquire. Errors: Conflict if somebody holds it.
Result<Lock> try_acquire_lock(std::string key, milliseconds ttl, Context ctx = {});
/// ServiceRegistry::register_service: until unregister_service() or close().
Result<std::int64_t> register_service(ServiceInfo service, Context ctx = {});
/// ServiceRegistry::unregister. Errors: NotFound if this process has not registered it.
Result<std::int64_t> unregister_service(std::string id, Context ctx = {});
/// ServiceRegistry::discover: the instances, by id; none is no error.
Result<std::vector<ServiceInfo>> discover_services(std::string name, Context ctx = {});
/// ServiceRegistry::watch: every change from now on.
Result<Watch<ServiceEvent>> watch_services(std::string name, Context ctx = {});
Result<Subscription> watch_services(std::string name,
                                    std::function<void(const ServiceEvent&)> handler,
                                    Context ctx = {});
/// ConfigCenter::get. Errors: NotFound.
Result<nlohmann::json> get_config(std::string key, Context ctx = {});
/// ConfigCenter::set; returns the revision.
Result<std::int64_t> set_config(std::string key, const nlohmann::json& value, Context ctx = {});
/// ConfigCenter::remove. Errors: NotFound.
Result<std::int64_t> delete_config(std::string key, Context ctx = {});
/// ConfigCenter::watch: every change of one key from now on.
Result<Watch<ConfigEvent>> watch_config(std::string key, Context ctx = {});
Result<Subscription> watch_config(std::string key, std::function<void(const ConfigEvent&)> handler,
                                  Context ctx = {});
/// ConfigCenter::list: the keys under `prefix`, in order.
Result<std::vector<std::string>> list_configs(std::string prefix, Context ctx = {});

// == 14. MemoryEtcd =============================================================================

#if COORDINATION_MEMORY_ETCD
namespace detail {
class MemoryStore;
}

/// An etcd in memory behind the Transport: for prototypes, and for tests of what a program does
/// when a lock is lost, a stream is cut or an answer never comes.
///
///   CoordinatorOptions options;
///   options.transport = std::make_shared<MemoryEtcd>();
///
/// It speaks the JSON gateway of etcd 3.5. Several Coordinators may share one, as several
/// processes share one etcd; each is known by its endpoints: "a:1" and "b:1" do. Of more than
/// 100,000 changes it discards the older half, as a compaction does.
class MemoryEtcd : public Transport {
 public:
  MemoryEtcd();
  /// With a clock of its own: leases run out by `clock`. Give the same one to
  /// CoordinatorOptions::clock.
  explicit MemoryEtcd(std::shared_ptr<Clock> clock);
  ~MemoryEtcd() override { shut_down(); }

  Result<HttpResponse> perform(const HttpRequest& request, const ChunkSink& sink,
                               const Context& ctx) override {
    return serve(request, sink, ctx);
  }

  /// A MemoryEtcd whose time stands still until advance() is called, and its clock.
  static std::shared_ptr<MemoryEtcd> manual_clock();
  std::shared_ptr<Clock> clock() const;
  /// Of manual_clock(): as ManualClock::advance; leases that ran out are gone when it returns.
  void advance(milliseconds by);

  // Faults. Requests are numbered from 1 in the order in which they came (streams count when they
  // open). An empty `path` means requests of every kind ("/v3/kv/put" only those), an empty
  // `endpoint` those of every Coordinator.

  /// The next `n` requests fail before they are applied: the connection is refused.
  void fail_next(int n, const std::string& path = "");
  /// The next `n` requests are applied, and their answers are lost.
  void drop_replies(int n, const std::string& path = "");
  /// The request with this number fails (`applied` false) or loses its answer (true).
  void fail_request(std::int64_t number, bool applied);
  /// The next `n` requests come to a member without a leader. "etcdserver: no leader", it says to
  /// those that need one, or ask for one (Grpc-Metadata-hasleader), and at once to both.
  void no_leader(int n, const std::string& path = "");
  /// Every answer comes so much later (real time).
  void delay(milliseconds by);
  /// Ends all streams now; `mid_line`: after half a line.
  void cut_streams(bool mid_line = false);
  /// Refuses every connection from `endpoint` and cuts its streams, until heal().
  void partition(const std::string& endpoint = "");
  void heal();
  /// A lease runs out now. False if there is none.
  bool expire_lease(std::int64_t id);
  /// Every token that was given out is dead.
  void invalidate_tokens();
  /// Discards history before the present revision.
  void compact();
  /// As an etcd that was killed and came back without its data, and is the same cluster by its id.
  void restart_empty();
  /// From now on every answer is that of another cluster. Not 0.
  void set_cluster_id(std::uint64_t id);
  /// Switches authentication on, with a user that may do anything. See also add_user.
  void enable_auth(const std::string& root_password);
  /// A user who may read and write keys that begin with `prefix`.
  void add_user(const std::string& name, const std::string& password, const std::string& prefix);

  // What is there.
  std::int64_t requests() const;     // how many have come
  std::uint64_t cluster_id() const;  // at first any, of its own for each object
  std::int64_t revision() const;
  std::vector<std::int64_t> leases() const;
  std::vector<std::string> keys() const;

 private:
  Result<HttpResponse> serve(const HttpRequest& request, const ChunkSink& sink, const Context& ctx);
  void shut_down();
  std::shared_ptr<detail::MemoryStore> store_;
};

#endif  // COORDINATION_MEMORY_ETCD

// == 15. Recipes ================================================================================
//
// What many programs write by hand: a few lines each over the sections above. Others stand where
// they belong: Context::on_signals, DistributedLock::with_lock and lease_slot, Election::lead,
// ServiceView::pick, ConfigCenter::update.

/// The default options, changed by the environment variables of etcdctl: ETCDCTL_ENDPOINTS (with
/// commas), _USER ("name" or "name:password"), _PASSWORD, _CACERT, _CERT, _KEY,
/// _INSECURE_SKIP_TLS_VERIFY and _COMMAND_TIMEOUT ("5s", as Go writes it). An empty one counts as
/// none. What cannot be read becomes what validate() refuses.
CoordinatorOptions options_from_env();

/// A number that is ours, and all that a Lock has. Made by DistributedLock::lease_slot.
class [[nodiscard]] Slot : public Lock {
 public:
  Slot(Lock lock, int number) : Lock(std::move(lock)), number_(number) {}
  /// From 0 to count - 1. After a loss somebody else may have it: see held() and on_lost().
  int number() const { return number_; }

 private:
  int number_;
};

template <class Fn>
Result<void> Election::lead(std::string name, std::string value, milliseconds ttl, Fn&& fn,
                            Context ctx) {
  while (true) {
    auto leadership = campaign(name, value, ttl, ctx);
    if (!leadership) return leadership.error();
    auto office = Context::child_of(ctx);
    leadership->on_lost([office](const Error&) { office.cancel(); });
    auto term = [&](Leadership& ours) { return fn(ours, office); };
    Result<void> done = detail::call(term, *leadership);
    auto resigned = leadership->resign();
    bool lost = !resigned && resigned.error().code == ErrorCode::Lost;
    if (!lost) return done;
  }
}

namespace detail {

/// What LiveConfig<T> shows: a `const T`, and since when.
struct LiveValue {
  std::shared_ptr<const void> value;
  std::int64_t revision{0};
  std::optional<Error> error{};
};
class LiveState;
using LiveDecode = std::function<Result<std::shared_ptr<const void>>(const nlohmann::json&)>;
using LiveHandler = std::function<void(const void* old, const void* now)>;

Result<std::shared_ptr<LiveState>> follow_config(ConfigCenter& config, std::string key,
                                                 std::shared_ptr<const void> initial,
                                                 LiveDecode decode, Context ctx);
std::shared_ptr<const LiveValue> live_value(const LiveState& live);
void on_live_change(LiveState& live, LiveHandler handler);
Result<void> wait_for_live(LiveState& live, std::int64_t revision, const Context& ctx);
const LiveView& live_view(const LiveState& live);

}  // namespace detail

/// One configuration value as a T that follows its key, for what is read on every request: a
/// number, bool, string, json, or what nlohmann/json converts (see ConfigCenter::get_as).
///
///   auto limits = LiveConfig<Limits>::follow(c.config(), "limits", Limits{100}).value();
///   if (used > limits->rate) ...
///
/// What cannot be used (no T, refused by the validator, removed) changes nothing: the last good
/// value stays, and error() says why. Copies share one value; the last of them ends it.
template <class T>
class [[nodiscard]] LiveConfig {
 public:
  /// Refuses a value by an Error: Error::make(ErrorCode::Validation, "rate must be positive"), or
  /// by throwing. It is also asked for the first one, but not for `initial`.
  using Validator = std::function<Result<void>(const T& value)>;

  /// Blocks: until the present value has been read. Errors: those of ConfigCenter::view; a value
  ///         that cannot be used is none: see error().
  static Result<LiveConfig> follow(ConfigCenter& config, std::string key, T initial,
                                   Validator validator = nullptr, Context ctx = {}) {
    auto decode = [key, valid = std::move(validator)](
                      const nlohmann::json& stored) -> Result<std::shared_ptr<const void>> {
      auto value = detail::convert<T>(stored, key);
      if (!value) return value.error();
      auto judged = valid ? valid(*value) : Result<void>();
      if (!judged) return judged.error();
      return std::shared_ptr<const void>(std::make_shared<const T>(std::move(*value)));
    };
    auto live =
        detail::follow_config(config, std::move(key), std::make_shared<const T>(std::move(initial)),
                              std::move(decode), std::move(ctx));
    if (!live) return live.error();
    return LiveConfig(std::move(*live));
  }

  /// The last good value; never null. It stays as it is while it is kept: for several members of
  /// one value. Local and lock-free: a pointer is copied, whoever reads waits for nobody.
  std::shared_ptr<const T> get() const {
    auto shown = detail::live_value(*live_);
    return std::shared_ptr<const T>(shown, static_cast<const T*>(shown->value.get()));
  }
  std::shared_ptr<const T> operator->() const { return get(); }
  /// A copy of it.
  T operator*() const { return *get(); }
  /// Of the last good value; 0 = `initial`.
  std::int64_t revision() const { return detail::live_value(*live_)->revision; }
  /// Why what is in etcd now is not shown: NotFound if there is no such key, Validation if it
  /// cannot be used, PermissionDenied if it may not be read any more. Nothing: it is.
  std::optional<Error> error() const { return detail::live_value(*live_)->error; }
  /// Calls `handler` with the value before and the one since then, after every change that is
  /// shown; several may be told as one. Threads: as the handlers of LiveView::on_change.
  void on_change(std::function<void(const T& old, const T& now)> handler) {
    detail::on_live_change(*live_,
                           [handler = std::move(handler)](const void* old, const void* now) {
                             handler(*static_cast<const T*>(old), *static_cast<const T*>(now));
                           });
  }
  /// Blocks: as LiveView::wait_for; then get() or error() tells of this revision or a later one.
  Result<void> wait_for(std::int64_t revision, Context ctx = {}) const {
    return detail::wait_for_live(*live_, revision, ctx);
  }
  /// What it rests on: connected(), age().
  const LiveView& view() const { return detail::live_view(*live_); }

  LiveConfig(const LiveConfig&) = default;  // and no move: there is no empty one
  LiveConfig& operator=(const LiveConfig&) = default;

 private:
  explicit LiveConfig(std::shared_ptr<detail::LiveState> live) : live_(std::move(live)) {}
  std::shared_ptr<detail::LiveState> live_;
};

}  // namespace v0
}  // namespace coordination

#endif  // COORDINATION_HPP

// == C. Implementation ==========================================================================

#if COORDINATION_HEADER_ONLY || defined(COORDINATION_IMPLEMENTATION)
#ifndef COORDINATION_IMPLEMENTED
#define COORDINATION_IMPLEMENTED

#if COORDINATION_HEADER_ONLY
#define COORDINATION_API inline
#else
#define COORDINATION_API
#endif

#if defined(__cpp_exceptions) || defined(__EXCEPTIONS) || defined(_CPPUNWIND)
#define COORDINATION_EXCEPTIONS 1
#else
#define COORDINATION_EXCEPTIONS 0
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <deque>
#include <list>
#include <mutex>
#include <random>
#include <set>
#include <system_error>
#include <thread>
#include <tuple>
#include <unordered_map>

#include <nlohmann/json.hpp>

#include <fcntl.h>
#if defined(_WIN32)
#include <io.h>
#include <process.h>
#else
#include <pthread.h>
#include <unistd.h>
#endif

#if COORDINATION_USE_HTTPLIB
#if !__has_include(<httplib.h>)
#error "coordination.hpp needs cpp-httplib (libcpp-httplib-dev), or COORDINATION_USE_HTTPLIB 0"
#endif
#include <httplib.h>
#if defined(_WIN32)
#include <winsock2.h>
#include <ws2tcpip.h>
#else
#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#endif
#ifdef CPPHTTPLIB_OPENSSL_SUPPORT
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#endif
#endif

namespace coordination {
inline namespace v0 {

// == 1. Errors ==================================================================================

COORDINATION_API const char* to_string(ErrorCode code) {
  switch (code) {
    case ErrorCode::Connection: return "CONNECTION_ERROR";
    case ErrorCode::Timeout: return "TIMEOUT_ERROR";
    case ErrorCode::NotFound: return "NOT_FOUND";
    case ErrorCode::Conflict: return "CONFLICT";
    case ErrorCode::Validation: return "VALIDATION_ERROR";
    case ErrorCode::Unavailable: return "SERVICE_UNAVAILABLE";
    case ErrorCode::Cancelled: return "CANCELLED";
    case ErrorCode::PermissionDenied: return "PERMISSION_DENIED";
    case ErrorCode::Lost: return "LOST";
    case ErrorCode::Compacted: return "COMPACTED";
    case ErrorCode::Internal: break;
  }
  return "INTERNAL_ERROR";
}

COORDINATION_API std::string to_string(const Error& error) {
  std::string text = std::string("[") + to_string(error.code) + "] " + error.message;
  if (!error.cause.empty()) text += ": " + error.cause;
  return text;
}

#if defined(__cpp_rtti) || defined(_CPPRTTI)  // without, who uses these two does not link
COORDINATION_API bool is_coordination_error(const std::exception& e) {
  return dynamic_cast<const CoordinationError*>(&e) != nullptr;
}

COORDINATION_API ErrorCode get_error_code(const std::exception& e) {
  auto* error = dynamic_cast<const CoordinationError*>(&e);
  return error ? error->code() : ErrorCode::Internal;
}
#endif

namespace detail {

COORDINATION_API void raise(const Error& error) {
#if COORDINATION_EXCEPTIONS
  throw CoordinationError(error);
#else
  std::fprintf(stderr, "%s\n", to_string(error).c_str());
  std::abort();
#endif
}

COORDINATION_API Error make_error(ErrorCode code, std::string message, std::string cause = {},
                                  Outcome outcome = Outcome::NotApplied) {
  return Error::make(code, std::move(message), std::move(cause), outcome);
}

COORDINATION_API Error invalid(std::string message) {
  return make_error(ErrorCode::Validation, std::move(message));
}

/// Bytes of a stranger for people and logs: without line ends, escapes and other control bytes.
COORDINATION_API std::string printable(std::string_view bytes) {
  std::string text;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    auto byte = static_cast<unsigned char>(bytes[i]);
    // Control characters of UTF-8.
    bool c1 = i > 0 && bytes[i - 1] == '\xc2' && byte >= 0x80 && byte < 0xa0;
    char code[8];
    std::snprintf(code, sizeof(code), "\\x%02x", byte);
    if (byte < 0x20 || byte == 0x7f || c1)
      text += code;
    else
      text += bytes[i];
  }
  return text;
}

COORDINATION_API Error closed_error() {
  bool is_child = this_process() > 1;
  return make_error(
      ErrorCode::Cancelled,
      is_child ? "the coordinator is closed, was moved from, or was made in another process"
               : "the coordinator is closed, or was moved from");
}

/// Calls `fn`; what it throws ends here, as text.
template <class Fn>
std::optional<std::string> guarded(Fn&& fn) {
#if COORDINATION_EXCEPTIONS
  try {
    fn();
  } catch (const std::exception& e) {
    return std::string(e.what());
  } catch (...) {
    return std::string("an exception that is no std::exception");
  }
#else
  fn();
#endif
  return std::nullopt;
}

}  // namespace detail

// == 2. Execution ===============================================================================

namespace detail {

/// std::stable_sort of libstdc++ 12 is deprecated in what it calls, which clang 19 tells its users.
template <class T, class Less>
void sort_stably(std::vector<T>& items, Less less) {
  std::list<T> list(std::make_move_iterator(items.begin()), std::make_move_iterator(items.end()));
  list.sort(less);
  std::move(list.begin(), list.end(), items.begin());
}

using SteadyTime = std::chrono::steady_clock::time_point;
using Task = std::function<void()>;
using std::chrono::steady_clock;

/// No deadline is later: sums of times do not overflow.
inline constexpr milliseconds kLongest = std::chrono::hours(24 * 365);

COORDINATION_API unsigned this_process() {
  static std::atomic<unsigned> number{1};
#if !defined(_WIN32)
  static const int kCounted = ::pthread_atfork(nullptr, nullptr, [] { ++number; });
  static_cast<void>(kCounted);
#endif
  return number;
}

/// One T for each process: a child of fork() must neither wait for what its parent has locked nor
/// draw the same random numbers. Never destroyed: what is static may close after everything else.
template <class T>
T& process_wide() {
  struct Node {
    T value{};
    unsigned process{this_process()};
    Node* before{nullptr};
  };
  static std::atomic<Node*> latest{nullptr};
  Node* found = latest;
  while (!found || found->process != this_process()) {
    auto fresh = std::make_unique<Node>();
    fresh->before = found;
    if (latest.compare_exchange_strong(found, fresh.get())) found = fresh.release();
  }
  return found->value;
}

COORDINATION_API void bury(std::shared_ptr<void> state) {
  struct Graves {
    std::mutex mutex;
    std::vector<std::shared_ptr<void>> states;
  };
  auto& graves = process_wide<Graves>();
  std::lock_guard<std::mutex> lock(graves.mutex);
  graves.states.push_back(std::move(state));
}

/// What a Context calls when it is cancelled: in its list until then. Owned by the one who listens,
/// so that it takes no memory of its own: every call makes a few.
struct Listener {
  Listener() = default;
  explicit Listener(Task to_call) : handler(std::move(to_call)) {}
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  void enter_before(Listener& other) {
    before = std::exchange(other.before, this);
    after = &other;
    before->after = this;
  }
  void leave() {
    before->after = after;
    after->before = before;
    before = after = this;
  }

  Task handler;
  std::weak_ptr<ContextState> child;
  Listener* before{this};
  Listener* after{this};
};

struct ContextState {
  static constexpr std::size_t kMostParents = 3;
  struct Parent {
    std::shared_ptr<ContextState> state;
    Listener listener;
  };

  std::mutex mutex;
  std::condition_variable returned;  // a handler has
  std::atomic<bool> cancelled{false};
  std::optional<SteadyTime> deadline;
  Listener listeners;  // a ring: this one is its begin and end
  const Listener* running{nullptr};
  std::thread::id runner;
  std::array<Parent, kMostParents> parents;

  ~ContextState() {
    for (auto& parent : parents) {
      if (parent.state) parent.state->remove(parent.listener);
    }
  }

  /// False: it is cancelled already.
  bool add(Listener& listener) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!cancelled) listener.enter_before(listeners);
    return !cancelled;
  }

  static void link(const std::shared_ptr<ContextState>& child, const Context& to, Parent& parent) {
    parent.listener.child = child;
    if (!to.state_->add(parent.listener)) return child->cancel();
    parent.state = to.state_;
  }

  void cancel() {
    std::unique_lock<std::mutex> lock(mutex);
    if (cancelled.exchange(true)) return;
    runner = std::this_thread::get_id();
    while (listeners.after != &listeners) {
      Listener& first = *listeners.after;
      first.leave();
      running = &first;
      lock.unlock();
      call(first);
      lock.lock();
      running = nullptr;
      returned.notify_all();
    }
  }

  /// It may be destroyed by what it calls.
  static void call(Listener& listener) {
    auto handler = std::move(listener.handler);
    auto child = listener.child.lock();
    if (child) child->cancel();
    if (handler) guarded(handler);
  }

  void remove(Listener& listener) {
    std::unique_lock<std::mutex> lock(mutex);
    listener.leave();
    returned.wait(lock,
                  [&] { return running != &listener || runner == std::this_thread::get_id(); });
  }
};

struct CancelHook {
  CancelHook(std::shared_ptr<ContextState> s, Task handler)
      : state(std::move(s)), listener(std::move(handler)) {}
  CancelHook(const CancelHook&) = delete;
  CancelHook& operator=(const CancelHook&) = delete;
  ~CancelHook() { state->remove(listener); }
  std::shared_ptr<ContextState> state;
  Listener listener;
};

/// A Context that ends with any of `parents` and at `deadline`.
COORDINATION_API Context join_contexts(std::initializer_list<const Context*> parents,
                                       std::optional<SteadyTime> deadline = std::nullopt) {
  assert(parents.size() <= ContextState::kMostParents);
  auto state = std::make_shared<ContextState>();
  state->deadline = deadline;
  auto place = state->parents.begin();
  for (const Context* parent : parents) {
    auto theirs = parent->deadline();
    if (theirs && (!state->deadline || *theirs < *state->deadline)) state->deadline = theirs;
    ContextState::link(state, *parent, *place++);
  }
  return Context(std::move(state));
}

/// What a call that `ctx` has ended says.
COORDINATION_API Error context_error(const Context& ctx, std::string what, std::string cause = {},
                                     Outcome outcome = Outcome::NotApplied) {
  auto code = ctx.cancelled() ? ErrorCode::Cancelled : ErrorCode::Timeout;
  return make_error(code, std::move(what), std::move(cause), outcome);
}

/// A mutex and its condition, waited for under a Context.
struct Gate {
  std::mutex mutex;
  std::condition_variable changed;

  void notify() {
    std::lock_guard<std::mutex> lock(mutex);
    changed.notify_all();
  }

  /// Blocks until `ready()` (called with the mutex held): true; or until `ctx` is done or `limit`
  /// is reached: false.
  template <class Ready>
  bool wait(const Context& ctx, Ready ready, std::optional<SteadyTime> limit = std::nullopt) {
    auto hook = ctx.on_cancel([this] { notify(); });
    auto end = ctx.deadline();
    if (limit && (!end || *limit < *end)) end = limit;
    std::unique_lock<std::mutex> lock(mutex);
    while (!ready()) {
      auto now = steady_clock::now();
      if (ctx.cancelled() || (end && now >= *end)) return false;
      auto longest = now + std::chrono::hours(1);
      changed.wait_until(lock, end ? (std::min)(*end, longest) : longest);
    }
    return true;
  }
};

/// Waits for `time`; false if `ctx` was done first.
COORDINATION_API bool pause(const Context& ctx, milliseconds time) {
  Gate gate;
  auto never = [] { return false; };
  gate.wait(ctx, never, steady_clock::now() + time);
  return !ctx.done();
}

/// "0.25 s", "1.5 s", "12 s".
COORDINATION_API std::string seconds_words(std::chrono::nanoseconds time) {
  std::array<char, 32> text{};
  auto seconds = std::chrono::duration<double>(time).count();
  std::snprintf(text.data(), text.size(), seconds < 10 ? "%.2g s" : "%.0f s", seconds);
  return text.data();
}

/// Raises `to` to `value`, unless it is as high already.
COORDINATION_API void raise_to(std::atomic<std::int64_t>& to, std::int64_t value) {
  auto before = to.load();
  while (value > before && !to.compare_exchange_weak(before, value)) {
  }
}

COORDINATION_API std::uint64_t random_number() {
  struct Seeded {
    std::mutex mutex;
    std::mt19937_64 engine;
    Seeded() {
      std::random_device device;
      std::seed_seq seed{device(), device(), device(), device()};
      engine.seed(seed);
    }
  };
  auto& seeded = process_wide<Seeded>();
  std::lock_guard<std::mutex> lock(seeded.mutex);
  return seeded.engine();
}

/// `time`, up to a quarter less.
COORDINATION_API milliseconds jittered(milliseconds time) {
  auto quarter = static_cast<std::uint64_t>(time.count() / 4 + 1);
  return time - milliseconds(static_cast<std::int64_t>(random_number() % quarter));
}

/// first, first * multiplier, ... up to last; with jitter.
class Backoff {
 public:
  Backoff(milliseconds first, milliseconds last, double multiplier = 2.0)
      : first_(first), next_(first), last_(last), multiplier_(multiplier) {}
  milliseconds next() {
    auto now = (std::min)(next_, last_);
    auto grown = (std::min)(static_cast<double>(now.count()) * multiplier_,
                            static_cast<double>(last_.count()));
    next_ = (std::max)(milliseconds(1), milliseconds(static_cast<std::int64_t>(grown)));
    return jittered(now);
  }
  void reset() { next_ = first_; }

 private:
  milliseconds first_, next_, last_;
  double multiplier_;
};

class SteadyClock : public Clock {
 public:
  time_point now() const override {
#if defined(CLOCK_BOOTTIME)
    timespec time;  // the steady clock of Linux stands still while the machine is suspended
    if (clock_gettime(CLOCK_BOOTTIME, &time) == 0) {
      auto since = std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
      return time_point(std::chrono::duration_cast<time_point::duration>(since));
    }
#endif
    return steady_clock::now();
  }
};

/// Which thread waits for a handler that runs in which other. Two handlers that end each other's
/// handles would wait for ever: the one that would close the ring does not wait.
class HandlerWaits {
 public:
  static HandlerWaits& all() { return process_wide<HandlerWaits>(); }

  /// False: `other` waits for the calling thread, directly or not.
  bool begin(std::thread::id other) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto self = std::this_thread::get_id();
    if (leads(other, self)) return false;
    waits_.emplace(self, other);
    return true;
  }

  /// Of all that the calling thread has begun.
  void end() {
    std::lock_guard<std::mutex> lock(mutex_);
    waits_.erase(std::this_thread::get_id());
  }

 private:
  bool leads(std::thread::id from, std::thread::id to) const {
    if (from == to) return true;
    auto range = waits_.equal_range(from);
    return std::any_of(range.first, range.second,
                       [&](const auto& wait) { return leads(wait.second, to); });
  }

  std::mutex mutex_;
  std::multimap<std::thread::id, std::thread::id> waits_;
};

/// The log. `post` has its lines written elsewhere, in order: a Logger may block, and who has
/// something to say may not. What is too much is dropped, and that is said.
class Log {
 public:
  using Post = std::function<void(Task)>;
  explicit Log(
      Logger logger, Post post = [](const Task& task) { task(); })
      : writer_(std::make_shared<Writer>()), post_(std::move(post)) {
    writer_->logger = std::move(logger);
  }

  void operator()(LogLevel level, std::string_view message, LogFields fields = {}) const {
    if (!writer_->logger) return;
    tell([writer = writer_, level, text = std::string(message), fields = std::move(fields)] {
      writer->logger(level, text, fields);
    });
  }
  /// Has a function of the user's called in the same way.
  void tell(Task task) const {
    if (writer_->waiting >= kMostWaiting) return void(++writer_->dropped);
    ++writer_->waiting;
    post_([writer = writer_, task = std::move(task)] { writer->run(task); });
  }

 private:
  static constexpr std::size_t kMostWaiting = 1000;

  struct Writer {
    Logger logger;
    std::atomic<std::size_t> waiting{0}, dropped{0};

    void run(const Task& task) {
      guarded(task);
      auto lost = --waiting == 0 ? dropped.exchange(0) : 0;
      if (lost == 0 || !logger) return;
      auto lines = std::to_string(lost);
      guarded([&] { logger(LogLevel::Warn, "the Logger is too slow", {{"lines lost", lines}}); });
    }
  };

  std::shared_ptr<Writer> writer_;
  Post post_;
};

/// A user's Clock. Should it throw, time goes on from what it has said last.
class GuardedClock : public Clock {
 public:
  GuardedClock(std::shared_ptr<Clock> clock, std::shared_ptr<const Log> log)
      : clock_(std::move(clock)), log_(std::move(log)) {}

  time_point now() const override {
    auto steady = steady_clock::now();
    time_point said{};
    auto thrown = guarded([&] { said = clock_->now(); });
    if (!thrown) return lead_ = said - steady, said;
    if (!told_.exchange(true)) (*log_)(LogLevel::Error, "the Clock throws", {{"what", *thrown}});
    return steady + lead_.load();
  }
  void on_jump(std::function<bool()> wake) override { clock_->on_jump(std::move(wake)); }
  void on_due(std::function<std::optional<time_point>()> next) override {
    clock_->on_due(std::move(next));
  }

 private:
  const std::shared_ptr<Clock> clock_;
  const std::shared_ptr<const Log> log_;
  mutable std::atomic<time_point::duration> lead_{time_point::duration(0)};
  mutable std::atomic<bool> told_{false};
};

/// Of a handler, for the log.
using Name = std::shared_ptr<const std::string>;

/// Waits until `ready()`; says after a while for whom.
template <class Ready, class Who>
void wait_aloud(std::condition_variable& changed, std::unique_lock<std::mutex>& lock,
                const Log& log, Ready ready, Who who) {
  if (changed.wait_for(lock, std::chrono::seconds(10), ready)) return;
  log(LogLevel::Warn, "a handler that does not return is waited for", {{"handler", who()}});
  changed.wait(lock, ready);
}

/// A queue of tasks and at most so many threads for them, which come when they are needed and
/// leave when they have been idle for a while.
class Lane : public std::enable_shared_from_this<Lane> {
 public:
  /// Where the system has no thread to give, `later` calls what it is given: then it tries again.
  explicit Lane(std::size_t most, std::function<void(Task)> later = nullptr)
      : most_(most), later_(std::move(later)) {}
  ~Lane() { reap(std::move(finished_)); }

  /// False: there is no thread for it, and nobody tries again. The task is dropped.
  bool post(Task task, Name name = nullptr) {
    std::vector<std::thread> finished;
    std::unique_lock<std::mutex> lock(mutex_);
    if (stopped_) return true;
    tasks_.push_back({std::move(task), std::move(name)});
    staff();
    if (threads_.empty() && !later_) return tasks_.pop_back(), false;
    finished.swap(finished_);
    lock.unlock();
    reap(std::move(finished));
    return true;
  }

  /// Drops what has not begun; what is posted later is dropped, too.
  void stop() {
    std::deque<Work> dropped;
    std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
    dropped.swap(tasks_);
    wake_.notify_all();
  }

  /// Waits until no other thread of this lane runs, but not past `limit`, nor for one that waits
  /// for this one; what runs on is left to itself. Without a limit it says for whom it waits.
  void join(std::optional<SteadyTime> limit, const Log& log = Log({})) {
    std::unique_lock<std::mutex> lock(mutex_);
    std::vector<std::thread::id> others;
    for (auto& thread : threads_) {
      bool other = thread.first != std::this_thread::get_id();
      if (other && HandlerWaits::all().begin(thread.first)) others.push_back(thread.first);
    }
    auto are_gone = [&] {
      return std::none_of(others.begin(), others.end(),
                          [&](auto id) { return threads_.count(id) > 0; });
    };
    if (limit) {
      changed_.wait_until(lock, *limit, are_gone);
    } else {
      wait_aloud(changed_, lock, log, are_gone, [&] { return names_of(others); });
    }
    HandlerWaits::all().end();
    for (auto& thread : threads_) thread.second.thread.detach();
    threads_.clear();
    auto finished = std::move(finished_);
    finished_.clear();
    lock.unlock();
    reap(std::move(finished));
  }

  bool runs_here() {
    std::lock_guard<std::mutex> lock(mutex_);
    return threads_.count(std::this_thread::get_id()) > 0;
  }

  /// Waits until there is nothing to do, but for what the caller does; `turns` of 10 ms at most,
  /// and not again for what has not ended by then. A machine that has no time gives the caller no
  /// turn, either: so the others have had theirs.
  void drain(int& turns, SteadyTime limit = (SteadyTime::max)()) {
    if (runs_here()) return;
    auto is_idle = [this] { return tasks_.empty() && idle_ >= threads_.size(); };
    std::unique_lock<std::mutex> lock(mutex_);
    bool idle = is_idle();
    while (!idle && !stuck_ && turns-- > 0) {
      auto turn = (std::min)(limit, steady_clock::now() + milliseconds(10));
      idle = changed_.wait_until(lock, turn, is_idle);
    }
    stuck_ = !idle;
  }

 private:
  struct Work {
    Task task;
    Name name;
  };
  struct Worker {
    std::thread thread;
    Name does{};
  };

  /// Sees to it that somebody does what waits. Under the mutex.
  void staff() {
    if (idle_ >= tasks_.size() || threads_.size() >= most_) return wake_.notify_one();
    auto failed = guarded([this] { add_thread(); });
    if (!failed || !later_ || std::exchange(tries_again_, true)) return;
    later_([weak = weak_from_this()] {
      auto self = weak.lock();
      if (!self) return;
      std::lock_guard<std::mutex> lock(self->mutex_);
      self->tries_again_ = false;
      if (!self->stopped_ && !self->tasks_.empty()) self->staff();
    });
  }

  void add_thread() {
    std::thread thread([self = shared_from_this()] { self->run(); });
    auto id = thread.get_id();
    threads_.emplace(id, Worker{std::move(thread)});
  }

  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto id = std::this_thread::get_id();
    while (next(lock)) {
      Work work = std::move(tasks_.front());
      tasks_.pop_front();
      auto self = threads_.find(id);
      if (self != threads_.end()) self->second.does = work.name;
      lock.unlock();
      work.task();
      work.task = nullptr;
      lock.lock();
    }
    auto self = threads_.find(id);
    if (self != threads_.end()) {
      finished_.push_back(std::move(self->second.thread));
      threads_.erase(self);
    }
    changed_.notify_all();
  }

  bool next(std::unique_lock<std::mutex>& lock) {
    ++idle_;
    changed_.notify_all();
    wake_.wait_for(lock, std::chrono::seconds(5), [&] { return stopped_ || !tasks_.empty(); });
    --idle_;
    return !stopped_ && !tasks_.empty();
  }

  std::string names_of(const std::vector<std::thread::id>& threads) const {
    std::string names;
    for (auto id : threads) {
      auto it = threads_.find(id);
      bool known = it != threads_.end() && it->second.does;
      if (known) names += (names.empty() ? "" : ", ") + *it->second.does;
    }
    return names;
  }

  static void reap(std::vector<std::thread> finished) {
    for (auto& thread : finished) {
      if (thread.get_id() == std::this_thread::get_id()) {
        thread.detach();
      } else {
        thread.join();
      }
    }
  }

  const std::size_t most_;
  const std::function<void(Task)> later_;
  std::mutex mutex_;
  std::condition_variable wake_;     // for a thread
  std::condition_variable changed_;  // a thread is idle, or gone
  std::deque<Work> tasks_;
  std::map<std::thread::id, Worker> threads_;
  std::vector<std::thread> finished_;
  std::size_t idle_{0};
  bool stopped_{false};
  bool stuck_{false};        // drain() was in vain
  bool tries_again_{false};  // to have another thread
};

/// Tasks at points in time, on one thread: they must be short.
class Timer {
 public:
  using Id = std::pair<SteadyTime, std::uint64_t>;

  Timer() : lane_(std::make_shared<Lane>(1)), shared_(std::make_shared<Shared>()) {}

  Id at(SteadyTime time, Task task) {
    std::lock_guard<std::mutex> lock(shared_->mutex);
    if (shared_->stopped) return {};
    Id id{time, ++shared_->last_id};
    bool first = shared_->tasks.empty() || id < shared_->tasks.begin()->first;
    shared_->tasks.emplace(id, std::move(task));
    if (ensure_running() && first && time < shared_->sleeps_until) shared_->changed.notify_one();
    return id;
  }

  Id after(milliseconds time, Task task) { return at(steady_clock::now() + time, std::move(task)); }

  void cancel(const Id& id) {
    std::map<Id, Task>::node_type dropped;  // destroyed outside the lock
    std::lock_guard<std::mutex> lock(shared_->mutex);
    dropped = shared_->tasks.extract(id);
  }

  void stop() {
    std::map<Id, Task> dropped;
    std::lock_guard<std::mutex> lock(shared_->mutex);
    shared_->stopped = true;
    dropped.swap(shared_->tasks);
    shared_->changed.notify_all();
    lane_->stop();
  }

  void join(SteadyTime limit) { lane_->join(limit); }

  /// False: the system has no thread for it. The first task asks again.
  bool start() {
    std::lock_guard<std::mutex> lock(shared_->mutex);
    return shared_->stopped || ensure_running();
  }

 private:
  struct Shared {
    std::mutex mutex;
    std::condition_variable changed;
    std::map<Id, Task> tasks;
    SteadyTime sleeps_until{(SteadyTime::max)()};  // a cancelled task may have been the first
    std::uint64_t last_id{0};
    bool running{false}, stopped{false};
  };

  bool ensure_running() {
    if (shared_->running) return true;
    return shared_->running = lane_->post([shared = shared_] { run(*shared); });
  }

  static void run(Shared& shared) {
    std::unique_lock<std::mutex> lock(shared.mutex);
    while (!shared.stopped) {
      shared.sleeps_until =
          shared.tasks.empty() ? (SteadyTime::max)() : shared.tasks.begin()->first.first;
      if (shared.tasks.empty()) {
        shared.changed.wait(lock);
      } else if (shared.sleeps_until > steady_clock::now()) {
        auto next = shared.sleeps_until;
        shared.changed.wait_until(lock, next);
      } else {
        auto node = shared.tasks.extract(shared.tasks.begin());
        lock.unlock();
        node.mapped()();
        node.mapped() = nullptr;
        lock.lock();
      }
    }
  }

  std::shared_ptr<Lane> lane_;
  std::shared_ptr<Shared> shared_;
};

/// The threads of one Coordinator.
inline constexpr std::size_t kCallbackThreads = 2;  // and as many for losses
inline constexpr std::size_t kMaxStreams = 5;  // one of them only while others are merged into it
inline constexpr std::size_t kUtmostStreams = 32;

struct Executor : std::enable_shared_from_this<Executor> {
  explicit Executor(Logger logger = nullptr)
      : log(std::make_shared<const Log>(
            std::move(logger), [lane = logs](Task line) { lane->post(std::move(line)); })) {}

  Timer timer;
  const std::shared_ptr<Lane> logs{lane(1, nullptr)};
  const std::shared_ptr<const Log> log;
  std::shared_ptr<Lane> callbacks{lane(kCallbackThreads, log)};  // user code only
  std::shared_ptr<Lane> losses{lane(kCallbackThreads, log)};     // on_lost
  std::shared_ptr<Lane> renewals{lane(3, log)};                  // nothing but lease renewals
  std::shared_ptr<Lane> asides{lane(3, log)};                    // second attempts
  std::shared_ptr<Lane> batches{lane(32, log)};                  // calls that share requests
  std::shared_ptr<Lane> logins{lane(1, log)};
  std::shared_ptr<Lane> background{lane(1, log)};  // tasks that are soon over
  std::shared_ptr<Lane> readers{lane(2, log)};     // reading again what was missed
  std::shared_ptr<Lane> streams{lane(kUtmostStreams + 8, log)};

  void run(const std::shared_ptr<Lane>& on, const Task& task, const Name& name = nullptr) {
    on->post(task, name);
  }
  void run_at(SteadyTime when, const std::shared_ptr<Lane>& on, const Task& task,
              const Name& name = nullptr) {
    if (when <= steady_clock::now()) return run(on, task, name);
    timer.at(when, [weak = weak_from_this(), on, task, name] {
      if (auto self = weak.lock()) self->run(on, task, name);
    });
  }

  /// Waits until there is nothing to do that anybody waits for, for two seconds at most (of a
  /// machine that has time).
  void settle() {
    int turns = 200;
    for (auto& one : {renewals, readers, background, losses, callbacks, logs}) one->drain(turns);
  }

  bool runs_handler_here() const { return callbacks->runs_here() || losses->runs_here(); }

  /// Handlers are waited for until `patience` ends, for ever if there is none.
  void stop(SteadyTime limit, std::optional<SteadyTime> patience = std::nullopt) {
    timer.stop();
    auto soon_over = {renewals, asides, batches, logins, background, readers, streams};
    auto handlers = {losses, callbacks};
    for (auto& one : soon_over) one->stop();
    for (auto& one : handlers) one->stop();
    timer.join(limit);
    for (auto& one : soon_over) one->join(limit);
    for (auto& one : handlers) one->join(patience, *log);
    limit = (std::max)(limit, steady_clock::now() + milliseconds(50));
    int turns = 100;
    logs->drain(turns, limit);
    logs->stop();
    logs->join(limit);
  }

 private:
  /// Where the system has no thread to give, it tries again.
  std::shared_ptr<Lane> lane(std::size_t most, std::shared_ptr<const Log> says) const {
    auto later = [timer = timer, says = std::move(says), told = SteadyTime{}](Task task) mutable {
      auto now = steady_clock::now();
      if (says && now - told > std::chrono::seconds(10)) {
        (*says)(LogLevel::Error, "the system has no thread to give; it is asked again"), told = now;
      }
      timer.after(milliseconds(500), std::move(task));
    };
    return std::make_shared<Lane>(most, later);
  }
};

/// Runs the handlers of one handle on the threads of a lane, one at a time and in order.
class Strand : public std::enable_shared_from_this<Strand> {
 public:
  Strand(std::weak_ptr<Executor> executor, std::shared_ptr<Lane> lane,
         std::shared_ptr<const Log> log, std::string name)
      : executor_(std::move(executor)), lane_(std::move(lane)), log_(std::move(log)),
        name_(std::make_shared<const std::string>(std::move(name))) {}

  void post(Task task) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return;
    tasks_.push_back(std::move(task));
    if (!std::exchange(scheduled_, true)) schedule();
  }

  /// No handler begins after this has returned.
  void shut() {
    std::list<Task> dropped;
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    dropped.swap(tasks_);
  }

  /// No handler runs after this has returned, unless it is called from inside one, or from a
  /// handler that this one waits for.
  void close() {
    shut();
    std::unique_lock<std::mutex> lock(mutex_);
    if (!running_ || !HandlerWaits::all().begin(runner_)) return;
    wait_aloud(
        idle_, lock, *log_, [this] { return !running_; }, [this] { return *name_; });
    HandlerWaits::all().end();
  }

 private:
  void schedule() {
    auto executor = executor_.lock();
    if (executor)
      executor->run(
          lane_, [self = shared_from_this()] { self->run_one(); }, name_);
  }

  void run_one() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (tasks_.empty()) {
      scheduled_ = false;
      return;
    }
    Task task = std::move(tasks_.front());
    tasks_.pop_front();
    running_ = true;
    runner_ = std::this_thread::get_id();
    lock.unlock();
    auto thrown = guarded(task);
    if (thrown) (*log_)(LogLevel::Error, "a handler has thrown", {{"what", *thrown}});
    task = nullptr;
    lock.lock();
    running_ = false;
    idle_.notify_all();
    scheduled_ = !tasks_.empty();
    if (scheduled_) schedule();
  }

  const std::weak_ptr<Executor> executor_;
  const std::shared_ptr<Lane> lane_;
  const std::shared_ptr<const Log> log_;
  const Name name_;
  std::mutex mutex_;
  std::condition_variable idle_;
  std::list<Task> tasks_;
  std::thread::id runner_;
  bool scheduled_{false}, running_{false}, closed_{false};
};

/// One at a time, waited for under a Context.
class Turnstile {
 public:
  bool enter(const Context& ctx) {
    return gate_.wait(ctx, [this] { return !std::exchange(busy_, true); });
  }
  void leave() {
    std::lock_guard<std::mutex> lock(gate_.mutex);
    busy_ = false;
    gate_.changed.notify_one();
  }

 private:
  Gate gate_;
  bool busy_{false};
};

/// Something that is lost at most once, and handlers that hear of it even if they came late.
class LossSignal {
 public:
  using Handler = std::function<void(const Error&)>;
  explicit LossSignal(std::shared_ptr<Strand> strand) : strand_(std::move(strand)) {}

  void add(Handler handler) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (shut_ || !handler) return;
    if (error_) return tell(std::move(handler));
    handlers_.push_back(std::move(handler));
  }

  void fire(Error error) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (error_) return;
    error_ = std::move(error);
    for (auto& handler : handlers_) tell(std::move(handler));
    handlers_.clear();
  }

  /// No handler begins from now on; one that runs is not waited for.
  void shut() {
    strand_->shut();
    std::vector<Handler> dropped;
    std::lock_guard<std::mutex> lock(mutex_);
    shut_ = true;
    dropped.swap(handlers_);
  }
  /// As Strand's.
  void close() {
    shut();
    strand_->close();
  }

 private:
  void tell(Handler handler) {
    strand_->post([handler = std::move(handler), error = *error_] { handler(error); });
  }

  std::shared_ptr<Strand> strand_;
  std::mutex mutex_;
  std::vector<Handler> handlers_;
  std::optional<Error> error_;
  bool shut_{false};
};

/// Handlers that hear that something has changed, even if they came late: once for all changes
/// since they were called last.
class ChangeSignal {
 public:
  explicit ChangeSignal(std::shared_ptr<Strand> strand) : strand_(std::move(strand)) {}

  void add(std::function<void()> call) {
    if (!call) return;
    std::lock_guard<std::mutex> lock(mutex_);
    handlers_.push_back(std::make_shared<Handler>());
    handlers_.back()->call = std::move(call);
    if (changed_) tell(handlers_.back());
  }
  void fire() {
    std::lock_guard<std::mutex> lock(mutex_);
    changed_ = true;
    for (auto& handler : handlers_) tell(handler);
  }
  void close() {
    std::vector<std::shared_ptr<Handler>> dropped;
    std::lock_guard<std::mutex> lock(mutex_);
    dropped.swap(handlers_);
  }

 private:
  struct Handler {
    std::function<void()> call;
    std::atomic<bool> told{false};
  };

  void tell(const std::shared_ptr<Handler>& handler) {
    if (handler->told.exchange(true)) return;
    strand_->post([handler] {
      handler->told = false;
      handler->call();
    });
  }

  std::shared_ptr<Strand> strand_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<Handler>> handlers_;
  bool changed_{false};
};

}  // namespace detail

COORDINATION_API Context::Context() : state_(std::make_shared<detail::ContextState>()) {}

COORDINATION_API Context Context::with_timeout(milliseconds timeout) {
  return with_deadline(std::chrono::steady_clock::now() +
                       std::clamp(timeout, -detail::kLongest, detail::kLongest));
}

COORDINATION_API Context Context::with_deadline(std::chrono::steady_clock::time_point deadline) {
  auto latest = std::chrono::steady_clock::now() + detail::kLongest;
  return detail::join_contexts({}, (std::min)(deadline, latest));
}

COORDINATION_API Context Context::child_of(const Context& parent) {
  return detail::join_contexts({&parent});
}

COORDINATION_API void Context::cancel() const {
  auto keep = state_;
  keep->cancel();
}

COORDINATION_API bool Context::cancelled() const { return state_->cancelled; }

COORDINATION_API bool Context::done() const {
  return cancelled() || (state_->deadline && std::chrono::steady_clock::now() >= *state_->deadline);
}

COORDINATION_API std::optional<std::chrono::steady_clock::time_point> Context::deadline() const {
  return state_->deadline;
}

COORDINATION_API bool Context::sleep_for(milliseconds time) const {
  return detail::pause(*this, time);
}

COORDINATION_API Context::Hook Context::on_cancel(std::function<void()> handler) const {
  auto hook = std::make_shared<detail::CancelHook>(state_, std::move(handler));
  if (state_->add(hook->listener)) return hook;
  hook->listener.handler();
  return nullptr;
}

COORDINATION_API const char* to_string(LogLevel level) {
  switch (level) {
    case LogLevel::Debug: return "DEBUG";
    case LogLevel::Info: return "INFO";
    case LogLevel::Warn: return "WARN";
    case LogLevel::Error: break;
  }
  return "ERROR";
}

namespace detail {
/// "2031-05-07T08:09:10.123Z".
COORDINATION_API std::string utc(std::chrono::system_clock::time_point time) {
  auto seconds = std::chrono::system_clock::to_time_t(time);
  auto since = std::chrono::duration_cast<milliseconds>(time.time_since_epoch()).count();
  std::tm parts{};
#if defined(_WIN32)
  gmtime_s(&parts, &seconds);
#else
  gmtime_r(&seconds, &parts);
#endif
  std::array<char, 32> text{};
  auto length = std::strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%S", &parts);
  std::snprintf(text.data() + length, text.size() - length, ".%03dZ",
                static_cast<int>(since % 1000));
  return text.data();
}
}  // namespace detail

COORDINATION_API Logger stderr_logger(LogLevel minimum) {
  return [minimum](LogLevel level, std::string_view message, const LogFields& fields) {
    if (level < minimum) return;
    auto line = detail::utc(std::chrono::system_clock::now()) + " " + to_string(level);
    line.append(" ").append(message);
    for (const auto& field : fields) line += " " + field.first + "=" + field.second;
    std::fprintf(stderr, "%s\n", detail::printable(line).c_str());
  };
}

struct ManualClock::State {
  std::mutex mutex;
  time_point now{std::chrono::steady_clock::now()};
  std::vector<std::shared_ptr<std::function<bool()>>> listeners;
  std::vector<std::shared_ptr<std::function<std::optional<time_point>()>>> agendas;

  /// Calls each of them, outside the mutex, and drops those that `is_over`.
  template <class Fn, class IsOver>
  void visit(std::vector<std::shared_ptr<Fn>>& all, IsOver is_over) {
    std::unique_lock<std::mutex> lock(mutex);
    auto called = all;
    lock.unlock();
    called.erase(std::remove_if(called.begin(), called.end(),
                                [&](const auto& fn) { return !is_over((*fn)()); }),
                 called.end());
    lock.lock();
    for (auto& fn : called) all.erase(std::remove(all.begin(), all.end(), fn), all.end());
  }

  /// From now to the next thing that is due, or less. Only a `first` step is for what is overdue.
  Clock::time_point::duration step(Clock::time_point::duration most, bool first) {
    std::unique_lock<std::mutex> lock(mutex);
    const auto from = now;
    lock.unlock();
    auto next = from + most;
    visit(agendas, [&](const std::optional<time_point>& due) {
      if (due && (first || *due > from)) next = (std::min)(next, *due);
      return !due;
    });
    return most.count() > 0 ? (std::max)(next, from) - from : most;
  }
};

COORDINATION_API ManualClock::ManualClock() : state_(std::make_shared<State>()) {}

COORDINATION_API Clock::time_point ManualClock::read() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->now;
}

COORDINATION_API void ManualClock::listen(std::function<bool()> wake) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->listeners.push_back(std::make_shared<std::function<bool()>>(std::move(wake)));
}

COORDINATION_API void ManualClock::ask(std::function<std::optional<time_point>()> next) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->agendas.push_back(
      std::make_shared<std::function<std::optional<time_point>()>>(std::move(next)));
}

COORDINATION_API void ManualClock::advance(milliseconds by) {
  time_point::duration left = by;
  bool first = true;
  do {
    auto step = state_->step(left, std::exchange(first, false));
    left -= step;
    {
      std::lock_guard<std::mutex> lock(state_->mutex);
      state_->now += step;
    }
    state_->visit(state_->listeners, [](bool goes_on) { return !goes_on; });
  } while (left.count() > 0);
}

// == 3. Wire ====================================================================================
//
// JSON is known here and nowhere else. What etcd says is taken as it comes: zeros are left out,
// 64-bit numbers are strings, bytes are base64, and nothing may be trusted to be there.

namespace detail::wire {

using Json = nlohmann::json;

inline constexpr int kMaxDepth = 128;  // nlohmann copies and prints by recursion
inline constexpr std::size_t kManyValues = 1'000'000;

COORDINATION_API void append_base64(std::string& out, std::string_view bytes) {
  static constexpr char kDigits[] =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  auto at = out.size();
  out.resize(at + (bytes.size() + 2) / 3 * 4, '=');
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    auto left = (std::min<std::size_t>)(bytes.size() - i, 3);
    std::uint32_t group = 0;
    for (std::size_t k = 0; k < 3; ++k) {
      group = group << 8 | (k < left ? static_cast<unsigned char>(bytes[i + k]) : 0U);
    }
    for (std::size_t k = 0; k <= left; ++k, group <<= 6) {
      out[at + k] = kDigits[group >> 18 & 63];
    }
    at += 4;
  }
}

COORDINATION_API std::string base64_encode(std::string_view bytes) {
  std::string text;
  append_base64(text, bytes);
  return text;
}

COORDINATION_API int base64_digit(char c) {
  if (c >= 'A' && c <= 'Z') return c - 'A';
  if (c >= 'a' && c <= 'z') return c - 'a' + 26;
  if (c >= '0' && c <= '9') return c - '0' + 52;
  return c == '+' ? 62 : c == '/' ? 63 : -1;
}

/// Standard alphabet, padded.
COORDINATION_API std::optional<std::string> base64_decode(std::string_view text) {
  if (text.size() % 4 != 0) return std::nullopt;
  std::size_t padding = 0;
  while (padding < 2 && padding < text.size() && text[text.size() - 1 - padding] == '=') ++padding;
  std::string bytes;
  bytes.reserve(text.size() / 4 * 3);
  for (std::size_t i = 0; i < text.size(); i += 4) {
    std::uint32_t group = 0;
    for (std::size_t k = 0; k < 4; ++k) {
      bool pad = i + k >= text.size() - padding;
      int digit = pad ? 0 : base64_digit(text[i + k]);
      if (digit < 0) return std::nullopt;
      group = group << 6 | static_cast<std::uint32_t>(digit);
    }
    for (int shift = 16; shift >= 0; shift -= 8) bytes += static_cast<char>(group >> shift & 0xff);
  }
  bytes.resize(bytes.size() - padding);
  return bytes;
}

/// How many values a text has at most; 0 if nlohmann may not be given it: nested deeper than
/// kMaxDepth; with a NUL, at which it would end; or of very many tiny values, each of which takes
/// some fifty bytes (etcd's own have 14 letters or more).
COORDINATION_API std::size_t count_values(std::string_view text) {
  const std::size_t most = (std::max)(kManyValues, text.size() / 8);
  std::size_t values = 1;
  int depth = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '\0') return 0;
    if (in_string && c == '\\') {
      ++i;
    } else if (c == '"') {
      in_string = !in_string;
    } else if (!in_string && (c == '{' || c == '[')) {
      if (++depth > kMaxDepth || ++values > most) return 0;
    } else if (!in_string && (c == '}' || c == ']')) {
      --depth;
    } else if (!in_string && c == ',' && ++values > most) {
      return 0;
    }
  }
  return values;
}

/// A value of a JSON text. What is in it follows it, each with its own.
struct Node {
  struct Items {
    bool named;  // an object, and no array
  };
  struct Iterator {
    const Node* at;
    const Node& operator*() const { return *at; }
    Iterator& operator++() { return at += at->size, *this; }
    bool operator!=(const Iterator& other) const { return at != other.at; }
  };

  std::variant<std::monostate, bool, std::int64_t, std::uint64_t, double, std::string_view, Items>
      value;
  std::string_view name{};  // as a member
  std::size_t size{1};      // with what is in it

  template <class T>
  const T* as() const {
    return std::get_if<T>(&value);
  }
  bool is_null() const { return value.index() == 0; }
  bool is_string() const { return as<std::string_view>() != nullptr; }
  bool is_integer() const { return as<std::int64_t>() || as<std::uint64_t>(); }
  bool is_object() const { return as<Items>() && as<Items>()->named; }
  Iterator begin() const { return {this + 1}; }
  Iterator end() const { return {this + size}; }
};

/// A JSON text as nlohmann reads it, in two pieces of memory however many values it has: what
/// etcd says is looked at once. nlohmann calls the functions that are not ours to name.
class Document {
 public:
  explicit Document(std::string_view text) {
    auto values = count_values(text);
    nodes_.reserve(values + 1), texts_.reserve(text.size());  // so nothing moves
    if (values == 0 || !read(text)) nodes_.clear();
  }
  Document(const Document&) = delete;
  Document& operator=(const Document&) = delete;

  /// Null if it is no JSON, or nested too deeply.
  const Node* root() const { return nodes_.empty() ? nullptr : &nodes_.front(); }

  bool null() { return add(std::monostate()); }
  bool boolean(bool value) { return add(value); }
  bool number_integer(std::int64_t value) { return add(value); }
  bool number_unsigned(std::uint64_t value) { return add(value); }
  bool number_float(double value, const std::string&) { return add(value); }
  bool string(const std::string& value) { return add(keep(value)); }
  bool key(const std::string& value) { return name_ = keep(value), true; }
  template <class Bytes>
  bool binary(const Bytes&) {
    return false;
  }
  bool start_object(std::size_t) { return open(true); }
  bool start_array(std::size_t) { return open(false); }
  bool end_object() { return close(); }
  bool end_array() { return close(); }
  template <class Problem>
  bool parse_error(std::size_t, const std::string&, const Problem&) {
    return false;
  }

 private:
  // The public way compiles its readers of four binary formats, too: 40 kB.
  bool read(std::string_view text) {
#if NLOHMANN_JSON_VERSION_MAJOR == 3 && NLOHMANN_JSON_VERSION_MINOR >= 8 && \
    NLOHMANN_JSON_VERSION_MINOR <= 12
    auto input = nlohmann::detail::input_adapter(text.begin(), text.end());
    return nlohmann::detail::parser<Json, decltype(input)>(std::move(input)).sax_parse(this);
#else
    return Json::sax_parse(text.begin(), text.end(), this);
#endif
  }
  std::string_view keep(const std::string& text) {
    auto at = texts_.size();
    texts_.insert(texts_.end(), text.begin(), text.end());
    return {texts_.data() + at, text.size()};
  }
  template <class T>
  bool add(T value) {
    nodes_.push_back({value, std::exchange(name_, {}), 1});
    return true;
  }
  // While one is open, its size is the place of the one that it is in.
  bool open(bool named) {
    add(Node::Items{named});
    nodes_.back().size = std::exchange(open_, nodes_.size() - 1);
    return true;
  }
  bool close() {
    open_ = std::exchange(nodes_[open_].size, nodes_.size() - open_);
    return true;
  }

  std::vector<Node> nodes_;
  std::vector<char> texts_;
  std::string_view name_;  // of the next value
  std::size_t open_{0};    // the innermost one whose end has not come
};

COORDINATION_API Json to_json(const Node& node) {
  auto* items = node.as<Node::Items>();
  Json json = items && items->named ? Json::object() : items ? Json::array() : Json();
  for (auto& item : node) {
    if (items->named) json[std::string(item.name)] = to_json(item);
    if (!items->named) json.push_back(to_json(item));
  }
  if (auto* value = node.as<bool>()) json = *value;
  if (auto* value = node.as<std::int64_t>()) json = *value;
  if (auto* value = node.as<std::uint64_t>()) json = *value;
  if (auto* value = node.as<double>()) json = *value;
  if (auto* value = node.as<std::string_view>()) json = std::string(*value);
  return json;
}

/// Empty if it is no JSON, or nested too deeply.
COORDINATION_API std::optional<Json> parse(std::string_view text) {
  Document document(text);
  if (!document.root()) return std::nullopt;
  return to_json(*document.root());
}

COORDINATION_API std::string dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

// Members of an object, by name; a missing or odd one is zero.

COORDINATION_API const Node& member(const Node& object, std::string_view name) {
  static const Node kNull{};
  const Node* found = &kNull;
  if (!object.is_object()) return kNull;
  for (auto& item : object) {
    if (item.name == name) found = &item;
  }
  return *found;
}

COORDINATION_API std::int64_t number(const Node& object, std::string_view name) {
  const Node& value = member(object, name);
  if (auto* number = value.as<std::int64_t>()) return *number;
  if (auto* number = value.as<std::uint64_t>()) return static_cast<std::int64_t>(*number);
  if (auto* real = value.as<double>()) {
    return std::abs(*real) < 9e18 ? static_cast<std::int64_t>(*real) : 0;
  }
  auto* text = value.as<std::string_view>();
  if (!text || text->empty()) return 0;
  std::int64_t below = 0;
  std::uint64_t above = 0;
  auto* end = text->data() + text->size();
  text->front() == '-' ? std::from_chars(text->data(), end, below)
                       : std::from_chars(text->data(), end, above);
  return below + static_cast<std::int64_t>(above);
}

COORDINATION_API std::string text(const Node& object, std::string_view name) {
  auto* value = member(object, name).as<std::string_view>();
  return value ? std::string(*value) : std::string();
}

/// Empty if it is a text that is no base64.
COORDINATION_API std::optional<std::string> some_bytes(const Node& object, std::string_view name) {
  auto* value = member(object, name).as<std::string_view>();
  return base64_decode(value ? *value : std::string_view());
}

COORDINATION_API std::string bytes(const Node& object, std::string_view name) {
  return some_bytes(object, name).value_or(std::string());
}

COORDINATION_API bool flag(const Node& object, std::string_view name) {
  auto* value = member(object, name).as<bool>();
  return value && *value;
}

COORDINATION_API std::int64_t header_revision(const Node& reply) {
  return number(member(reply, "header"), "revision");
}

/// The cluster that says it; 0: the answer does not tell.
COORDINATION_API std::uint64_t cluster_id(const Node& reply) {
  return static_cast<std::uint64_t>(number(member(reply, "header"), "cluster_id"));
}

// Requests.

/// Writes one object, until its destructor. Numbers are strings; what is zero is left out.
class Object {
 public:
  explicit Object(std::string& out) : out_(out) { out_ += '{'; }
  ~Object() { out_ += '}'; }
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;

  std::string& out() { return out_; }
  /// Where the value of a member is to be written.
  std::string& member(const char* name) {
    out_ += std::exchange(first_, false) ? "\"" : ",\"";
    out_ += name;
    return out_ += "\":";
  }
  /// Of what needs no escapes.
  void text(const char* name, std::string_view value) {
    member(name) += '"';
    out_.append(value.data(), value.size()) += '"';
  }
  void number(const char* name, std::int64_t value) {
    if (value != 0) text(name, std::to_string(value));
  }
  void flag(const char* name, bool value) {
    if (value) member(name) += "true";
  }
  void bytes(const char* name, std::string_view value) {
    if (value.empty()) return;
    member(name) += '"';
    append_base64(out_, value);
    out_ += '"';
  }
  /// etcd cannot take an empty key where it begins a range of all keys: "\0" stands for it.
  void range(const std::string& key, const std::string& end) {
    bytes("key", key.empty() && !end.empty() ? std::string_view("\0", 1) : key);
    bytes("range_end", end);
  }

 private:
  std::string& out_;
  bool first_{true};
};

COORDINATION_API void encode(std::string& out, const RangeRequest& request) {
  static constexpr const char* kOrders[] = {"NONE", "ASCEND", "DESCEND"};
  static constexpr const char* kTargets[] = {"KEY", "VERSION", "CREATE", "MOD", "VALUE"};
  Object object(out);
  object.range(request.key, request.range_end);
  object.number("limit", request.limit);
  object.number("revision", request.revision);
  if (request.sort_order != SortOrder::None || request.sort_target != SortTarget::Key) {
    object.text("sort_order", kOrders[static_cast<int>(request.sort_order)]);
    object.text("sort_target", kTargets[static_cast<int>(request.sort_target)]);
  }
  object.flag("serializable", request.serializable);
  object.flag("keys_only", request.keys_only);
  object.flag("count_only", request.count_only);
  object.number("min_mod_revision", request.min_mod_revision);
  object.number("max_mod_revision", request.max_mod_revision);
  object.number("min_create_revision", request.min_create_revision);
  object.number("max_create_revision", request.max_create_revision);
}

COORDINATION_API void encode(std::string& out, const PutRequest& request) {
  Object object(out);
  object.bytes("key", request.key);
  if (!request.ignore_value) object.bytes("value", request.value);
  if (!request.ignore_lease) object.number("lease", request.lease);
  object.flag("prev_kv", request.prev_kv);
  object.flag("ignore_value", request.ignore_value);
  object.flag("ignore_lease", request.ignore_lease);
}

COORDINATION_API void encode(std::string& out, const RemoveRequest& request) {
  Object object(out);
  object.range(request.key, request.range_end);
  object.flag("prev_kv", request.prev_kv);
}

COORDINATION_API void encode(std::string& out, const Compare& compare) {
  // etcd 3.5 takes a name that it does not know for the first one, without a word.
  static constexpr const char* kResults[] = {"EQUAL", "GREATER", "LESS", "NOT_EQUAL"};
  static constexpr const char* kTargets[] = {"VERSION", "CREATE", "MOD", "VALUE", "LEASE"};
  static constexpr const char* kFields[] = {"version", "create_revision", "mod_revision", "value",
                                            "lease"};
  auto target = static_cast<int>(compare.target);
  bool of_value = compare.target == Compare::Target::Value;
  Object object(out);
  object.range(compare.key, compare.range_end);
  object.text("result", kResults[static_cast<int>(compare.is)]);
  object.text("target", kTargets[target]);
  object.text(kFields[target],
              of_value ? base64_encode(compare.bytes) : std::to_string(compare.number));
}

COORDINATION_API void encode(std::string& out, const Txn& txn);
COORDINATION_API void encode(std::string& out, const Op& op);

template <class Item>
void encode(std::string& out, const std::vector<Item>& items) {
  out += '[';
  for (auto& item : items) {
    if (&item != &items.front()) out += ',';
    encode(out, item);
  }
  out += ']';
}

COORDINATION_API void encode(std::string& out, const Op& op) {
  static constexpr const char* kNames[] = {"request_range", "request_put", "request_delete_range",
                                           "request_txn"};
  Object object(out);
  object.member(kNames[op.request.index()]);
  if (auto* range = std::get_if<RangeRequest>(&op.request)) encode(out, *range);
  if (auto* put = std::get_if<PutRequest>(&op.request)) encode(out, *put);
  if (auto* remove = std::get_if<RemoveRequest>(&op.request)) encode(out, *remove);
  auto* txn = std::get_if<std::shared_ptr<const Txn>>(&op.request);
  if (txn) encode(out, **txn);
}

COORDINATION_API void encode(std::string& out, const Txn& txn) {
  Object object(out);
  encode(object.member("compare"), txn.compare);
  encode(object.member("success"), txn.success);
  encode(object.member("failure"), txn.failure);
}

template <class Request>
std::string body(const Request& request) {
  std::string out;
  encode(out, request);
  return out;
}

COORDINATION_API std::string compaction_body(std::int64_t revision) {
  return R"({"revision":")" + std::to_string(revision) + R"("})";
}

COORDINATION_API std::string grant_body(std::int64_t id, std::int64_t ttl_seconds) {
  return R"({"ID":")" + std::to_string(id) + R"(","TTL":")" + std::to_string(ttl_seconds) + R"("})";
}

COORDINATION_API std::string lease_body(std::int64_t id) {
  return R"({"ID":")" + std::to_string(id) + R"("})";
}

COORDINATION_API std::string login_body(const std::string& name, const std::string& password) {
  return "{\"name\":" + dump(name) + ",\"password\":" + dump(password) + "}";
}

COORDINATION_API std::string watch_body(const WatchRequest& request, std::int64_t id,
                                        std::int64_t start_revision) {
  std::string out = "{\"create_request\":";
  {
    Object object(out);
    object.range(request.key, request.range_end);
    object.number("start_revision", start_revision);
    object.flag("prev_kv", request.prev_kv);
    object.number("watch_id", id);
    object.flag("progress_notify", true);
    object.flag("fragment", true);  // no line is much longer than the largest request
    if (request.no_put) object.member("filters") += "[\"NOPUT\"]";
    if (request.no_delete) object.member("filters") += "[\"NODELETE\"]";
  }
  return out += '}';
}

// Replies. False: there is a key or a value in it that cannot be read.

COORDINATION_API bool decode(const Node& json, KeyValue& kv) {
  auto key = some_bytes(json, "key");
  auto value = some_bytes(json, "value");
  if (!key || !value) return false;
  kv.key = std::move(*key);
  kv.value = std::move(*value);
  kv.create_revision = number(json, "create_revision");
  kv.mod_revision = number(json, "mod_revision");
  kv.version = number(json, "version");
  kv.lease = number(json, "lease");
  return true;
}

COORDINATION_API bool decode(const Node& json, std::optional<KeyValue>& to) {
  return !json.is_object() || decode(json, to.emplace());
}

COORDINATION_API bool decode(const Node& list, std::vector<KeyValue>& to) {
  for (auto& kv : list) {
    if (!decode(kv, to.emplace_back())) return false;
  }
  return true;
}

COORDINATION_API bool decode(const Node& json, RangeResponse& to) {
  to.count = number(json, "count");
  to.more = flag(json, "more");
  to.revision = header_revision(json);
  return decode(member(json, "kvs"), to.kvs);
}

COORDINATION_API bool decode(const Node& json, PutResponse& to) {
  to.revision = header_revision(json);
  return decode(member(json, "prev_kv"), to.prev_kv);
}

COORDINATION_API bool decode(const Node& json, RemoveResponse& to) {
  to.deleted = number(json, "deleted");
  to.revision = header_revision(json);
  return decode(member(json, "prev_kvs"), to.prev_kvs);
}

COORDINATION_API bool decode(const Node& json, TxnResponse& to);

COORDINATION_API bool decode_op(const Node& json, OpResponse& to) {
  const Node& put = member(json, "response_put");
  if (!put.is_null()) return decode(put, to.emplace<PutResponse>());
  const Node& remove = member(json, "response_delete_range");
  if (!remove.is_null()) return decode(remove, to.emplace<RemoveResponse>());
  const Node& txn = member(json, "response_txn");
  if (txn.is_null()) return decode(member(json, "response_range"), to.emplace<RangeResponse>());
  auto inner = std::make_shared<TxnResponse>();
  to = inner;
  return decode(txn, *inner);
}

COORDINATION_API bool decode(const Node& json, TxnResponse& to) {
  to.succeeded = flag(json, "succeeded");
  to.revision = header_revision(json);
  for (auto& response : member(json, "responses")) {
    if (!decode_op(response, to.responses.emplace_back())) return false;
  }
  return true;
}

/// Of grant, timetolive and keepalive: seconds; 0 or -1 = no such lease.
struct LeaseReply {
  std::int64_t id{0};
  std::int64_t ttl{0};
  std::uint64_t cluster{0};
};

COORDINATION_API bool decode(const Node& json, LeaseReply& to) {
  to.id = number(json, "ID");
  to.ttl = number(json, "TTL");
  to.cluster = cluster_id(json);
  return true;
}

COORDINATION_API bool decode(const Node& json, Status& to) {
  to.version = text(json, "version");
  to.db_size = number(json, "dbSize");
  to.leader = static_cast<std::uint64_t>(number(json, "leader"));
  to.raft_term = static_cast<std::uint64_t>(number(json, "raftTerm"));
  to.revision = header_revision(json);
  to.member_id = static_cast<std::uint64_t>(number(member(json, "header"), "member_id"));
  for (auto& error : member(json, "errors")) {
    if (auto* words = error.as<std::string_view>()) to.errors.emplace_back(*words);
  }
  return true;
}

struct Token {
  std::string text;
};
COORDINATION_API bool decode(const Node& json, Token& to) {
  to.text = text(json, "token");
  return true;
}

struct Nothing {};
COORDINATION_API bool decode(const Node&, Nothing&) { return true; }

/// A unary reply of etcd, and of which cluster; empty if it is something else.
template <class Reply>
std::optional<std::uint64_t> decode_reply(std::string_view body, Reply& to) {
  Document document(body);
  auto* json = document.root();
  if (!json || !member(*json, "header").is_object() || !decode(*json, to)) return std::nullopt;
  return cluster_id(*json);
}

/// The same of any request, undecoded. Some replies have no header (alarms, a defragmentation).
COORDINATION_API std::optional<std::uint64_t> decode_any(std::string_view body, Json& to) {
  Document document(body);
  auto* json = document.root();
  if (!json || !json->is_object()) return std::nullopt;
  to = to_json(*json);
  return cluster_id(*json);
}

/// Empty if it is no object; null counts as an empty one.
COORDINATION_API std::string any_body(const Json& json) {
  return json.is_null() ? "{}" : json.is_object() ? dump(json) : std::string();
}

struct EtcdError {
  int code{0};  // of gRPC
  std::string message;
};

/// Of a unary reply or of the line of a stream, from either gateway (3.4 and some 3.5, or later);
/// empty if it is none.
COORDINATION_API std::optional<EtcdError> decode_error(const Node& json) {
  const Node& error = member(json, "error");
  const Node& from = error.is_object() ? error : json;
  EtcdError result;
  result.message = text(from, "message");
  if (result.message.empty()) result.message = text(json, "error");
  result.code = static_cast<int>(number(from, "code"));
  if (result.code == 0) result.code = static_cast<int>(number(from, "grpc_code"));
  if (result.message.empty() && result.code == 0) return std::nullopt;
  return result;
}

COORDINATION_API std::optional<EtcdError> decode_error_body(std::string_view body) {
  Document document(body);
  return document.root() ? decode_error(*document.root()) : std::nullopt;
}

// Streams.

/// Cuts a stream into its lines; a line may come in any number of pieces.
class Lines {
 public:
  /// Calls `line(text)` for each complete line, until it returns false.
  template <class Fn>
  bool feed(std::string_view piece, Fn&& line) {
    while (true) {
      auto end = piece.find('\n');
      if (end == std::string_view::npos) break;
      rest_.append(piece.substr(0, end));
      piece.remove_prefix(end + 1);
      std::string whole;
      whole.swap(rest_);
      if (!whole.empty() && !line(std::string_view{whole})) return false;
    }
    rest_.append(piece);
    return true;
  }

  /// etcd 3.4 ends a failed stream with a line that has no end.
  template <class Fn>
  void finish(Fn&& line) {
    std::string whole;
    whole.swap(rest_);
    if (!whole.empty()) line(std::string_view{whole});
  }

 private:
  std::string rest_;
};

struct WatchLine {
  std::uint64_t cluster{0};
  std::int64_t id{0};
  std::int64_t revision{0};
  std::int64_t compact_revision{0};
  bool created{false}, canceled{false};
  bool fragment{false};  // the next line of this watch goes on with it
  std::string cancel_reason;
  std::vector<WatchEvent> events;
};

COORDINATION_API bool decode(const Node& json, WatchEvent& to) {
  to.type = text(json, "type") == "DELETE" ? EventType::Delete : EventType::Put;
  bool good = decode(member(json, "kv"), to.kv) && decode(member(json, "prev_kv"), to.prev_kv);
  to.revision = to.kv.mod_revision;
  return good;
}

COORDINATION_API bool decode(const Node& json, WatchLine& to) {
  to.cluster = cluster_id(json);
  to.id = number(json, "watch_id");
  to.revision = header_revision(json);
  to.compact_revision = number(json, "compact_revision");
  to.created = flag(json, "created");
  to.canceled = flag(json, "canceled");
  to.fragment = flag(json, "fragment");
  to.cancel_reason = text(json, "cancel_reason");
  for (auto& event : member(json, "events")) {
    if (!decode(event, to.events.emplace_back())) return false;
  }
  return true;
}

/// One line of a stream: a result, an error of etcd's, or neither: then it is no line of etcd's.
template <class Line>
std::variant<std::monostate, Line, EtcdError> decode_line(std::string_view line) {
  Document document(line);
  auto* json = document.root();
  if (!json) return {};
  const Node& result = member(*json, "result");
  if (result.is_object()) {
    Line decoded;
    if (decode(result, decoded)) return decoded;
    return {};
  }
  auto error = decode_error(*json);
  if (error) return *error;
  return {};
}

/// The events of a watch stream, whole where etcd has cut a line in several.
class Fragments {
 public:
  /// The events of a line, after what an earlier one has left over. Where the line goes on, its
  /// last revision is held back: it may not be whole.
  std::vector<WatchEvent> whole(WatchLine& line) {
    if (!line.fragment && parts_.empty()) return std::move(line.events);
    auto node = parts_.extract(line.id);
    auto events = node ? std::move(node.mapped()) : std::vector<WatchEvent>();
    events.insert(events.end(), std::make_move_iterator(line.events.begin()),
                  std::make_move_iterator(line.events.end()));
    if (!line.fragment || events.empty()) return events;
    auto last = std::find_if(events.begin(), events.end(), [&](const WatchEvent& event) {
      return event.revision == events.back().revision;
    });
    parts_[line.id].assign(std::make_move_iterator(last), std::make_move_iterator(events.end()));
    events.erase(last, events.end());
    return events;
  }
  void forget(std::int64_t watch) { parts_.erase(watch); }

 private:
  std::map<std::int64_t, std::vector<WatchEvent>> parts_;  // by watch
};

// Records.

/// As the Go module writes it: ttl in nanoseconds.
COORDINATION_API std::string encode_service(const ServiceInfo& service) {
  auto ttl = std::chrono::duration_cast<std::chrono::nanoseconds>(service.ttl).count();
  Json metadata = Json::object();
  for (auto& [name, value] : service.metadata) metadata[name] = value;
  return "{\"address\":" + dump(service.address) + ",\"id\":" + dump(service.id) +
         ",\"metadata\":" + dump(metadata) + ",\"name\":" + dump(service.name) +
         ",\"port\":" + std::to_string(service.port) + ",\"ttl\":" + std::to_string(ttl) + "}";
}

/// Whether the member is missing, null, or what `is` says.
template <class Is>
bool absent_or(const Node& object, std::string_view name, Is is) {
  const Node& value = member(object, name);
  return value.is_null() || is(value);
}

/// What Go's decoder would refuse is no record.
COORDINATION_API bool is_service(const Node& json) {
  auto is_string = [](const Node& value) { return value.is_string(); };
  auto is_integer = [](const Node& value) { return value.is_integer(); };
  auto are_strings = [](const Node& value) {
    bool all = value.is_object();
    for (auto& item : value) all = all && item.is_string();
    return all;
  };
  return json.is_object() && absent_or(json, "id", is_string) &&
         absent_or(json, "name", is_string) && absent_or(json, "address", is_string) &&
         absent_or(json, "port", is_integer) && absent_or(json, "ttl", is_integer) &&
         absent_or(json, "metadata", are_strings);
}

COORDINATION_API std::optional<ServiceInfo> decode_service(std::string_view record) {
  Document document(record);
  auto* json = document.root();
  if (!json || !is_service(*json)) return std::nullopt;
  ServiceInfo service;
  service.id = text(*json, "id");
  service.name = text(*json, "name");
  service.address = text(*json, "address");
  auto port = number(*json, "port");
  if (service.id.empty() || service.name.empty() || port < 0 || port > 65535) return std::nullopt;
  service.port = static_cast<int>(port);
  auto ttl = std::chrono::nanoseconds(number(*json, "ttl"));
  service.ttl = std::chrono::duration_cast<milliseconds>(ttl);
  for (auto& item : member(*json, "metadata")) {
    service.metadata[std::string(item.name)] = *item.as<std::string_view>();
  }
  return service;
}

COORDINATION_API bool deeper(const Json& json, int limit) {
  if (!json.is_structured()) return false;
  return limit == 0 || std::any_of(json.begin(), json.end(),
                                   [&](const Json& child) { return deeper(child, limit - 1); });
}

/// Empty if it is no JSON value, or one that cannot be read back.
COORDINATION_API std::optional<std::string> encode_config(const Json& value) {
  if (value.is_discarded() || deeper(value, kMaxDepth)) return std::nullopt;
  auto text = dump(value);
  auto back = parse(text);  // NaN, binary and what is not UTF-8 change on the way
  if (!back || *back != value) return std::nullopt;
  if (!value.is_string()) return text;
  const auto& raw = value.get_ref<const std::string&>();
  return parse(raw) ? text : raw;
}

COORDINATION_API Json decode_config(const std::string& bytes) {
  auto json = parse(bytes);
  return json ? std::move(*json) : Json(bytes);
}

}  // namespace detail::wire

// == 4. Transport ===============================================================================

namespace detail {

COORDINATION_API bool wants_tls(const TlsOptions& tls) {
  return !(tls.ca_file + tls.ca_pem + tls.cert_file + tls.cert_pem).empty();
}

#if COORDINATION_USE_HTTPLIB

/// OpenSSL writes to sockets that another thread may have shut down: that raises SIGPIPE, which
/// kills a process by default. While this lives, the calling thread gets none.
class NoSigpipe {
 public:
#if defined(_WIN32)
  NoSigpipe() {}
#else
  NoSigpipe() {
    sigset_t pending;
    sigemptyset(&pipe_);
    sigaddset(&pipe_, SIGPIPE);
    sigpending(&pending);
    was_pending_ = sigismember(&pending, SIGPIPE) == 1;
    pthread_sigmask(SIG_BLOCK, &pipe_, &before_);
  }
  NoSigpipe(const NoSigpipe&) = delete;
  NoSigpipe& operator=(const NoSigpipe&) = delete;
  ~NoSigpipe() {
    sigset_t pending;
    sigpending(&pending);
    int signal = 0;
    if (!was_pending_ && sigismember(&pending, SIGPIPE) == 1) sigwait(&pipe_, &signal);
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }

 private:
  sigset_t pipe_, before_;
  bool was_pending_;
#endif
};

// Where the systems' sockets differ.

inline constexpr socket_t kNoSocket = static_cast<socket_t>(-1);
inline constexpr std::size_t kMostAtOnce = 1 << 20;  // of bytes; as an int it is positive

#if defined(_WIN32)
using PollFd = WSAPOLLFD;
using IoSize = int;
inline int poll_sockets(PollFd* fds, std::size_t count, int time) {
  return ::WSAPoll(fds, static_cast<ULONG>(count), time);
}
inline const char* resolver_error(int error) { return ::gai_strerrorA(error); }
inline int socket_error() { return ::WSAGetLastError(); }
inline bool would_block(int error) { return error == WSAEWOULDBLOCK; }
inline void close_socket(socket_t socket) { ::closesocket(socket); }
inline void shut_socket(socket_t socket) { ::shutdown(socket, SD_BOTH); }
inline void make_nonblocking(socket_t socket) {
  u_long on = 1;
  ::ioctlsocket(socket, FIONBIO, &on);
}
#else
using PollFd = pollfd;
using IoSize = std::size_t;
inline int poll_sockets(PollFd* fds, std::size_t count, int time) {
  return ::poll(fds, static_cast<nfds_t>(count), time);
}
inline const char* resolver_error(int error) { return ::gai_strerror(error); }
inline int socket_error() { return errno; }
inline bool would_block(int error) {
  return error == EAGAIN || error == EWOULDBLOCK || error == EINPROGRESS || error == EINTR;
}
inline void close_socket(socket_t socket) { ::close(socket); }
inline void shut_socket(socket_t socket) { ::shutdown(socket, SHUT_RDWR); }
inline void make_nonblocking(socket_t socket) {
  ::fcntl(socket, F_SETFD, FD_CLOEXEC);
  ::fcntl(socket, F_SETFL, ::fcntl(socket, F_GETFL) | O_NONBLOCK);
}
#endif

/// What a system call's error means, in plain words.
COORDINATION_API std::string system_words(int error) {
#if !defined(_WIN32)
  switch (error) {
    case ECONNREFUSED: return "connection refused";
    case EHOSTUNREACH: return "no route to host";
    case ENETUNREACH: return "network is unreachable";
    case EMFILE:
    case ENFILE: return "no file descriptors left";
    case ECONNRESET:
    case EPIPE: return "the connection was reset";
    default: break;
  }
#endif
  return std::system_category().message(error);
}

/// For poll(): rounded up, an hour at most.
COORDINATION_API int poll_time(SteadyTime until) {
  auto left = std::chrono::ceil<milliseconds>(until - steady_clock::now());
  milliseconds most = std::chrono::hours(1);
  return static_cast<int>(std::clamp(left, milliseconds(0), most).count());
}

COORDINATION_API void tune_socket(socket_t socket) {
  auto set = [&](int level, int option, int value) {
    ::setsockopt(socket, level, option, reinterpret_cast<const char*>(&value), sizeof(value));
  };
  make_nonblocking(socket);
  set(IPPROTO_TCP, TCP_NODELAY, 1);
  set(SOL_SOCKET, SO_KEEPALIVE, 1);
#if defined(TCP_KEEPIDLE) && defined(TCP_KEEPINTVL) && defined(TCP_KEEPCNT)
  // A member whose host is gone is noticed within 10 + 3 * 5 seconds, also by an idle stream.
  set(IPPROTO_TCP, TCP_KEEPIDLE, 10);
  set(IPPROTO_TCP, TCP_KEEPINTVL, 5);
  set(IPPROTO_TCP, TCP_KEEPCNT, 3);
#endif
}

struct HostPort {
  bool tls{false};
  std::string host;
  int port{0};
};

/// Of "http[s]://host:port" with [] around IPv6.
COORDINATION_API HostPort split_endpoint(const std::string& endpoint) {
  HostPort result;
  result.tls = endpoint.compare(0, 8, "https://") == 0;
  auto rest = endpoint.substr(result.tls ? 8 : 7);
  auto colon = rest.rfind(':');
  result.port = static_cast<int>(std::strtol(rest.c_str() + colon + 1, nullptr, 10));
  bool bracketed = rest.front() == '[';
  result.host = bracketed ? rest.substr(1, colon - 2) : rest.substr(0, colon);
  auto zone = result.host.find("%25");  // as URLs write the % before it
  if (zone != std::string::npos) result.host.erase(zone + 1, 2);
  return result;
}

struct Address {
  sockaddr_storage bytes{};
  socklen_t size{0};
  bool operator==(const Address& other) const {
    return size == other.size && std::memcmp(&bytes, &other.bytes, size) == 0;
  }
};

COORDINATION_API std::string resolver_words(int error) {
#if defined(EAI_SYSTEM)
  if (error == EAI_SYSTEM || errno == EMFILE) return system_words(errno);
#endif
  return std::string("host name not found: ") + resolver_error(error);
}

/// All addresses of a host, in the order of the system; none: `cause` says why.
COORDINATION_API std::vector<Address> resolve(const HostPort& to, std::string& cause) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  errno = 0;
  int error = ::getaddrinfo(to.host.c_str(), std::to_string(to.port).c_str(), &hints, &found);
  if (error != 0) return cause = resolver_words(error), std::vector<Address>{};
  std::vector<Address> addresses;
  for (auto* entry = found; entry; entry = entry->ai_next) {
    Address address;
    address.size = static_cast<socklen_t>(entry->ai_addrlen);
    std::memcpy(&address.bytes, entry->ai_addr, entry->ai_addrlen);
    addresses.push_back(address);
  }
  ::freeaddrinfo(found);
  return addresses;
}

/// Connects to one of several addresses, as RFC 8305 does it: the next one is tried beside the
/// others when they have been silent for a while, and at once when the last of them has failed.
class ConnectRace {
 public:
  ConnectRace(const std::vector<Address>& addresses, SteadyTime deadline)
      : addresses_(addresses), deadline_(deadline) {}
  ConnectRace(const ConnectRace&) = delete;
  ConnectRace& operator=(const ConnectRace&) = delete;
  ~ConnectRace() {
    for (auto& runner : runners_) close_socket(runner.socket);
  }

  /// The socket that was connected first; kNoSocket when all have failed, or `stop()` is true.
  template <class Stop>
  socket_t run(const Stop& stop) {
    while (!stop() && (next_ < addresses_.size() || !runners_.empty())) {
      auto now = steady_clock::now();
      bool due = runners_.empty() || now >= next_start_;
      if (due && next_ < addresses_.size()) start(now);
      auto socket = look(now);
      if (socket != kNoSocket) return socket;
    }
    return kNoSocket;
  }

  const Address& winner() const { return addresses_[winner_]; }
  /// Why all have failed.
  const std::string& cause() const { return cause_; }

 private:
  struct Runner {
    socket_t socket;
    std::size_t address;
    SteadyTime began, until;
  };
  static constexpr milliseconds kHeadStart{250};
  static constexpr milliseconds kMost{1500};  // for one address
  static constexpr milliseconds kSlice{10};   // what cannot be shut down yet looks at stop()

  void start(SteadyTime now) {
    next_start_ = now + kHeadStart;
    if (now >= deadline_) return void(next_ = addresses_.size());
    auto& to = addresses_[next_];
    Runner runner{::socket(to.bytes.ss_family, SOCK_STREAM, 0), next_++, now,
                  (std::min)(deadline_, now + SteadyTime::duration(kMost))};
    if (runner.socket == kNoSocket) return failed(system_words(socket_error()));
    tune_socket(runner.socket);
    auto* address = reinterpret_cast<const sockaddr*>(&to.bytes);
    int error = ::connect(runner.socket, address, to.size) == 0 ? 0 : socket_error();
    if (error == 0 || would_block(error)) return runners_.push_back(runner);
    close_socket(runner.socket);
    failed(system_words(error));
  }

  socket_t look(SteadyTime now) {
    std::vector<PollFd> fds;
    for (auto& runner : runners_) fds.push_back({runner.socket, POLLOUT, 0});
    poll_sockets(fds.data(), fds.size(), static_cast<int>(fds.empty() ? 0 : kSlice.count()));
    for (std::size_t i = runners_.size(); i-- > 0;) {
      auto runner = runners_[i];
      bool over = fds[i].revents == 0 && now >= runner.until;
      if (fds[i].revents == 0 && !over) continue;
      runners_.erase(runners_.begin() + static_cast<std::ptrdiff_t>(i));
      int error = over ? 0 : pending_error(runner.socket);
      if (!over && error == 0) return winner_ = runner.address, runner.socket;
      close_socket(runner.socket);
      failed(over ? "no answer in " + seconds_words(runner.until - runner.began) +
                        " to the connection attempt"
                  : system_words(error));
    }
    return kNoSocket;
  }

  static int pending_error(socket_t socket) {
    int error = 0;
    socklen_t size = sizeof(error);
    ::getsockopt(socket, SOL_SOCKET, SO_ERROR, reinterpret_cast<char*>(&error), &size);
    return error;
  }

  void failed(const std::string& why) {
    if (cause_.find(why) != std::string::npos) return;
    cause_ += (cause_.empty() ? "" : "; ") + why;
  }

  const std::vector<Address>& addresses_;
  const SteadyTime deadline_;
  std::vector<Runner> runners_;
  SteadyTime next_start_{};
  std::size_t next_{0}, winner_{0};
  std::string cause_;
};

#ifdef CPPHTTPLIB_OPENSSL_SUPPORT

/// What OpenSSL has complained about last in this thread; forgets it.
COORDINATION_API std::string openssl_words() {
  auto* reason = ERR_reason_error_string(ERR_peek_last_error());
  std::string words = reason ? reason : "a failure that OpenSSL does not name";
  ERR_clear_error();
  return words;
}

COORDINATION_API std::string date_words(const ASN1_TIME* time) {
  std::tm date{};
  char text[40] = "a date that makes no sense";
  if (ASN1_TIME_to_tm(time, &date) == 1) {
    std::strftime(text, sizeof(text), "%Y-%m-%d %H:%M:%S UTC", &date);
  }
  return text;
}

COORDINATION_API std::string name_words(X509_NAME* name) {
  char text[256] = "";
  X509_NAME_oneline(name, text, sizeof(text));
  return text;
}

COORDINATION_API std::string alternative_words(const GENERAL_NAME& name) {
  auto* data = name.type == GEN_DNS || name.type == GEN_IPADD ? name.d.ia5 : nullptr;
  if (!data) return "another kind of name";
  std::string_view bytes(reinterpret_cast<const char*>(ASN1_STRING_get0_data(data)),
                         static_cast<std::size_t>(ASN1_STRING_length(data)));
  if (name.type == GEN_DNS) return printable(bytes);
  char text[INET6_ADDRSTRLEN] = "";
  ::inet_ntop(bytes.size() == 4 ? AF_INET : AF_INET6, bytes.data(), text, sizeof(text));
  return text;
}

/// The names that a certificate is for.
COORDINATION_API std::string names_of(X509* certificate) {
  std::unique_ptr<GENERAL_NAMES, void (*)(GENERAL_NAMES*)> names(
      static_cast<GENERAL_NAMES*>(
          X509_get_ext_d2i(certificate, NID_subject_alt_name, nullptr, nullptr)),
      GENERAL_NAMES_free);
  std::string words;
  for (int i = 0; names && i < sk_GENERAL_NAME_num(names.get()) && i < 10; ++i) {
    words += (i == 0 ? "" : ", ") + alternative_words(*sk_GENERAL_NAME_value(names.get(), i));
  }
  return words.empty() ? "no host (it has no subjectAltName)" : words;
}

/// Why a certificate of the server's is not accepted for `host`.
COORDINATION_API std::string certificate_words(X509_STORE_CTX* store, const std::string& host) {
  auto* certificate = X509_STORE_CTX_get_current_cert(store);
  int error = X509_STORE_CTX_get_error(store);
  std::string which = "the certificate of the server";
  if (!certificate) return which + ": " + X509_verify_cert_error_string(error);
  if (X509_STORE_CTX_get_error_depth(store) > 0) {
    which = "the CA " + name_words(X509_get_subject_name(certificate)) + " of the server";
  }
  switch (error) {
    case X509_V_ERR_CERT_HAS_EXPIRED:
      return which + " has expired on " + date_words(X509_get0_notAfter(certificate));
    case X509_V_ERR_CERT_NOT_YET_VALID:
      return which + " is not yet valid, but from " + date_words(X509_get0_notBefore(certificate)) +
             " on";
    case X509_V_ERR_HOSTNAME_MISMATCH:
    case X509_V_ERR_IP_ADDRESS_MISMATCH:
      return which + " is for " + names_of(certificate) + ", not for " + host;
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT:
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
    case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
    case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
    case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
      return which +
             " was issued by an unknown CA: " + name_words(X509_get_issuer_name(certificate));
    default: return which + ": " + X509_verify_cert_error_string(error);
  }
}

/// A text in PEM, and what it is called in errors.
struct Pem {
  std::string text, name;
  bool operator==(const Pem& other) const { return text == other.text; }

  using Bio = std::unique_ptr<BIO, int (*)(BIO*)>;
  Bio bio() const {
    return Bio(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())), BIO_free);
  }
};

/// The text itself, or what is in the file.
COORDINATION_API Result<Pem> load_pem(const std::string& text, const std::string& file,
                                      const std::string& option) {
  if (!text.empty() || file.empty()) return Pem{text, option + "_pem"};
  Pem pem{{}, option + "_file " + file};
  std::FILE* stream = std::fopen(file.c_str(), "rb");
  int error = stream ? 0 : errno;
  char piece[4096];
  for (std::size_t n = 1; stream && n > 0; pem.text.append(piece, n)) {
    n = std::fread(piece, 1, sizeof(piece), stream);
    if (n == 0 && std::ferror(stream)) error = errno;
  }
  if (stream) std::fclose(stream);
  if (error == 0) return pem;
  return make_error(ErrorCode::Validation, pem.name + " cannot be read", system_words(error));
}

/// The SSL_CTX for TlsOptions. It is made anew when a file has changed; if that is not possible
/// (a certificate has been replaced, and its key has not yet), the last one stays in use.
class TlsFactory {
 public:
  using Ssl = std::shared_ptr<SSL_CTX>;

  explicit TlsFactory(TlsOptions options) : options_(std::move(options)) {}

  Result<Ssl> get() {
    auto ca = load_pem(options_.ca_pem, options_.ca_file, "tls.ca");
    auto cert = load_pem(options_.cert_pem, options_.cert_file, "tls.cert");
    auto key = load_pem(options_.key_pem, options_.key_file, "tls.key");
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto* pem : {&ca, &cert, &key}) {
      if (!*pem) return last_ ? Result<Ssl>(last_) : pem->error();
    }
    std::array<Pem, 3> pems{*ca, *cert, *key};
    if (last_ && pems == pems_) return last_;
    auto made = make(pems);
    if (!made) return last_ ? Result<Ssl>(last_) : made;
    pems_ = std::move(pems);
    last_ = *made;
    return last_;
  }

  /// OpenSSL's own end, at exit, may come before ours.
  void forget() {
    std::lock_guard<std::mutex> lock(mutex_);
    last_.reset();
  }

 private:
  Result<Ssl> make(const std::array<Pem, 3>& pems) const {
    Ssl ssl(SSL_CTX_new(TLS_client_method()), SSL_CTX_free);
    if (!ssl) return make_error(ErrorCode::Internal, "there is no TLS", openssl_words());
    bool newest = options_.min_version == TlsVersion::Tls13;
    SSL_CTX_set_min_proto_version(ssl.get(), newest ? TLS1_3_VERSION : TLS1_2_VERSION);
    SSL_CTX_set_mode(ssl.get(),
                     SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    auto& [ca, cert, key] = pems;
    auto good = options_.verify_server ? use_ca(ssl.get(), ca) : Result<void>{};
    if (good && !cert.text.empty()) good = use_certificate(ssl.get(), cert);
    if (good && !cert.text.empty()) good = use_key(ssl.get(), key, cert);
    ERR_clear_error();
    if (!good) return good.error();
    return ssl;
  }

  static Error bad(const Pem& pem, const std::string& what) {
    return make_error(ErrorCode::Validation, pem.name + " " + what);
  }

  /// All certificates of a PEM text.
  static std::vector<std::shared_ptr<X509>> certificates(const Pem& pem) {
    std::vector<std::shared_ptr<X509>> all;
    auto bio = pem.bio();
    while (auto* one = PEM_read_bio_X509(bio.get(), nullptr, password, nullptr)) {
      all.emplace_back(one, X509_free);
    }
    return all;
  }

  Result<void> use_ca(SSL_CTX* ssl, const Pem& ca) const {
    if (options_.ca_file.empty() && options_.ca_pem.empty()) return use_system_ca(ssl);
    auto all = certificates(ca);
    if (all.empty()) return bad(ca, "holds no certificate in PEM");
    for (auto& one : all) X509_STORE_add_cert(SSL_CTX_get_cert_store(ssl), one.get());
    return {};
  }

  static Result<void> use_system_ca(SSL_CTX* ssl) {
    SSL_CTX_set_default_verify_paths(ssl);
#if defined(_WIN32) && OPENSSL_VERSION_NUMBER >= 0x30200000L
    SSL_CTX_load_verify_store(ssl, "org.openssl.winstore://");
#endif
    return {};
  }

  static Result<void> use_certificate(SSL_CTX* ssl, const Pem& cert) {
    auto chain = certificates(cert);
    if (chain.empty()) return bad(cert, "holds no certificate in PEM");
    bool used = SSL_CTX_use_certificate(ssl, chain.front().get()) == 1;
    for (std::size_t i = 1; i < chain.size(); ++i) {
      used = used && SSL_CTX_add1_chain_cert(ssl, chain[i].get()) == 1;
    }
    if (!used) return bad(cert, "cannot be used: " + openssl_words());
    return {};
  }

  Result<void> use_key(SSL_CTX* ssl, const Pem& key, const Pem& cert) const {
    auto* given = const_cast<std::string*>(&options_.key_password);
    auto bio = key.bio();
    std::shared_ptr<EVP_PKEY> read(PEM_read_bio_PrivateKey(bio.get(), nullptr, password, given),
                                   EVP_PKEY_free);
    bool locked = key.text.find("ENCRYPTED") != std::string::npos;
    if (!read && locked) return bad(key, "is encrypted, and tls.key_password does not open it");
    if (!read) return bad(key, "holds no private key in PEM");
    bool fits = SSL_CTX_use_PrivateKey(ssl, read.get()) == 1;
    if (!fits || SSL_CTX_check_private_key(ssl) != 1) {
      return bad(key, "is not the key of " + cert.name);
    }
    return {};
  }

  /// Without this OpenSSL would ask at the terminal.
  static int password(char* to, int size, int, void* given) {
    if (!given) return 0;
    auto& text = *static_cast<const std::string*>(given);
    auto length = (std::min)(text.size(), static_cast<std::size_t>(size));
    std::copy_n(text.data(), length, to);
    return static_cast<int>(length);
  }

  const TlsOptions options_;
  std::mutex mutex_;
  std::array<Pem, 3> pems_;
  Ssl last_;
};

#endif

/// Whether that is what somebody must be told who only knows that it has ended.
COORDINATION_API bool is_about_its_end(const std::string& cause) {
  return cause == "the connection was closed" || cause == "the connection was reset";
}

/// A connection to one member. Its socket does not block, so that every wait has an end. One
/// thread uses it; another may cut it.
class Connection {
 public:
  Connection() = default;
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;
  virtual ~Connection() {
    if (socket_ != kNoSocket) close_socket(socket_);
  }

  /// Ends whatever is under way, and all that is to come.
  void cut() {
    std::lock_guard<std::mutex> lock(mutex_);
    cut_ = true;
    if (socket_ != kNoSocket) shut_socket(socket_);
  }

  /// False: cause() says why. `known` is the address that worked the last time, and is tried first.
  bool connect(const HostPort& to, std::optional<Address>& known, SteadyTime deadline) {
    auto addresses = resolve(to, cause_);
    if (addresses.empty()) return false;
    if (steady_clock::now() >= deadline) return fail("no time was left to connect");
    auto first = known ? std::find(addresses.begin(), addresses.end(), *known) : addresses.begin();
    if (first != addresses.end()) std::rotate(addresses.begin(), first, first + 1);
    ConnectRace race(addresses, deadline);
    auto socket = race.run([this] { return is_cut(); });
    if (socket == kNoSocket) return fail(race.cause());
    known = race.winner();
    std::lock_guard<std::mutex> lock(mutex_);
    socket_ = socket;
    return !cut_;
  }
  /// What both sides have to agree upon before the first request.
  virtual bool begin(SteadyTime deadline) { return static_cast<void>(deadline), true; }

  /// The number of bytes; 0 at the end of what the server says; -1 if they are not to be had.
  ssize_t read(char* to, std::size_t size, SteadyTime until) {
    return transfer([&] { return receive(to, size); }, POLLIN, until);
  }
  /// The number of bytes, or -1.
  ssize_t write(const char* from, std::size_t size, SteadyTime until) {
    return transfer([&] { return send(from, size); }, POLLOUT, until);
  }

  /// Between two requests a server says nothing: bytes, or an end, mean that it is leaving.
  bool is_quiet() const {
    PollFd fd{socket_, POLLIN, 0};
    return poll_sockets(&fd, 1, 0) == 0;
  }

  socket_t socket() const { return socket_; }
  /// The server has turned us away before it read a request.
  bool rejected() const { return rejected_; }
  /// It is there, but it and we do not agree on TLS: time alone does not mend that.
  bool disagrees() const { return disagrees_; }
  /// What has failed; empty if a wait was too long, or was cut short.
  const std::string& cause() const { return cause_; }

 protected:
  bool fail(std::string why) { return cause_ = std::move(why), false; }
  void disagree(std::string why) { disagrees_ = !fail(std::move(why)); }
  void reject(std::string why) { disagree(std::move(why)), rejected_ = true; }

  /// Repeats `step` until it need not wait for the other side.
  template <class Step>
  ssize_t transfer(const Step& step, short direction, SteadyTime until) {
    while (true) {
      auto result = step();
      if (result > 0) return static_cast<ssize_t>(result);
      short events = blocked_on(result, direction);
      if (events == 0) return cause_.empty() ? 0 : -1;
      if (!wait(events, until)) return -1;
    }
  }

 private:
  // As recv() and send() do it.
  virtual int receive(char* to, std::size_t size) {
    return static_cast<int>(::recv(socket_, to, static_cast<IoSize>(size), 0));
  }
  virtual int send(const char* from, std::size_t size) {
    auto most = (std::min)(size, kMostAtOnce);
    return static_cast<int>(::send(socket_, from, static_cast<IoSize>(most), 0));
  }
  /// What a step that came to nothing has to wait for; 0: it has failed, or met the end.
  virtual short blocked_on(int result, short direction) {
    int error = result < 0 ? socket_error() : 0;
    if (would_block(error)) return direction;
    if (error != 0) fail(system_words(error));
    return 0;
  }

  bool wait(short events, SteadyTime until) {
    PollFd fd{socket_, events, 0};
    while (!is_cut() && steady_clock::now() < until) {
      if (poll_sockets(&fd, 1, poll_time(until)) > 0) return !is_cut();
    }
    return false;
  }
  bool is_cut() {
    std::lock_guard<std::mutex> lock(mutex_);
    return cut_;
  }

  std::mutex mutex_;
  socket_t socket_{kNoSocket};
  bool cut_{false};
  bool rejected_{false}, disagrees_{false};
  std::string cause_;
};

#ifdef CPPHTTPLIB_OPENSSL_SUPPORT

/// The same with TLS. The server must prove to be `host` if `verify` is true.
class TlsConnection : public Connection {
 public:
  TlsConnection(TlsFactory::Ssl context, const std::string& host, bool verify)
      : context_(std::move(context)), host_(host.substr(0, host.find('%'))), verify_(verify) {}
  ~TlsConnection() override {
    if (ssl_) SSL_shutdown(ssl_.get());
    ERR_clear_error();
  }

  bool begin(SteadyTime deadline) override {
    auto began = steady_clock::now();
    auto until = (std::min)(deadline, began + SteadyTime::duration(kMost));
    if (!prepare()) return fail(openssl_words());
    auto result = transfer([this] { return SSL_connect(ssl_.get()); }, POLLIN, until);
    if (result > 0) return true;
    if (is_about_its_end(cause())) fail(cause() + " in the TLS handshake: is it an http port?");
    if (!cause().empty()) return false;
    return fail("no answer in " + seconds_words(until - began) + " to the TLS handshake");
  }

 private:
  static constexpr milliseconds kMost{3000};  // for the handshake

  bool prepare() {
    ERR_clear_error();
    ssl_.reset(SSL_new(context_.get()));
    if (!ssl_ || SSL_set_fd(ssl_.get(), static_cast<int>(socket())) != 1) return false;
    SSL_set_app_data(ssl_.get(), this);
    SSL_set_cert_cb(ssl_.get(), on_asked, this);
    SSL_set_verify(ssl_.get(), verify_ ? SSL_VERIFY_PEER : SSL_VERIFY_NONE, on_verified);
    auto* expected = SSL_get0_param(ssl_.get());
    // A CN is no host's name, and a wildcard stands for one whole label.
    X509_VERIFY_PARAM_set_hostflags(
        expected, X509_CHECK_FLAG_NEVER_CHECK_SUBJECT | X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
    if (X509_VERIFY_PARAM_set1_ip_asc(expected, host_.c_str()) == 1) return true;
    ERR_clear_error();
    return X509_VERIFY_PARAM_set1_host(expected, host_.c_str(), host_.size()) == 1 &&
           SSL_set_tlsext_host_name(ssl_.get(), host_.c_str()) == 1;
  }

  static int on_asked(SSL*, void* self) {
    static_cast<TlsConnection*>(self)->asked_ = true;
    return 1;
  }
  static int on_verified(int good, X509_STORE_CTX* store) {
    auto* ssl =
        static_cast<SSL*>(X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx()));
    auto* self = static_cast<TlsConnection*>(SSL_get_app_data(ssl));
    if (!good && self->verify_) self->disagree(certificate_words(store, self->host_));
    return good;
  }

  int receive(char* to, std::size_t size) override {
    ERR_clear_error();
    return SSL_read(ssl_.get(), to, static_cast<int>(size));
  }
  int send(const char* from, std::size_t size) override {
    ERR_clear_error();
    return SSL_write(ssl_.get(), from, static_cast<int>((std::min)(size, kMostAtOnce)));
  }
  short blocked_on(int result, short) override {
    int error = socket_error();
    switch (SSL_get_error(ssl_.get(), result)) {
      case SSL_ERROR_WANT_READ: return POLLIN;
      case SSL_ERROR_WANT_WRITE: return POLLOUT;
      case SSL_ERROR_ZERO_RETURN: return 0;
      case SSL_ERROR_SYSCALL:
        fail(error == 0 ? "the connection was closed" : system_words(error));
        return 0;
      default: explain(); return 0;
    }
  }

  /// A failure of TLS in words.
  void explain() {
    int reason = ERR_GET_REASON(ERR_peek_last_error());
    switch (reason) {
      case SSL_R_CERTIFICATE_VERIFY_FAILED: break;  // on_verified() has said it
#if defined(SSL_R_UNEXPECTED_EOF_WHILE_READING)
      case SSL_R_UNEXPECTED_EOF_WHILE_READING: fail("the connection was closed"); break;
#endif
      case SSL_R_WRONG_VERSION_NUMBER:
      case SSL_R_HTTP_REQUEST:
        disagree("https spoken to a port without TLS: is it an http port?");
        break;
      case SSL_R_UNSUPPORTED_PROTOCOL:
      case SSL_R_TLSV1_ALERT_PROTOCOL_VERSION:
        disagree("the server has no version of TLS that is new enough");
        break;
      case SSL_R_SSLV3_ALERT_HANDSHAKE_FAILURE:
        if (!asked_) {
          disagree("the server has refused the TLS handshake: no version or cipher in common");
          break;
        }
        [[fallthrough]];
      case SSL_R_TLSV13_ALERT_CERTIFICATE_REQUIRED:
      case SSL_R_SSLV3_ALERT_BAD_CERTIFICATE:
      case SSL_R_SSLV3_ALERT_UNSUPPORTED_CERTIFICATE:
      case SSL_R_SSLV3_ALERT_CERTIFICATE_REVOKED:
      case SSL_R_SSLV3_ALERT_CERTIFICATE_EXPIRED:
      case SSL_R_SSLV3_ALERT_CERTIFICATE_UNKNOWN:
      case SSL_R_TLSV1_ALERT_UNKNOWN_CA:
        reject(SSL_get_certificate(ssl_.get())
                   ? "the server has refused the client certificate: " + openssl_words()
                   : "the server demands a client certificate");
        break;
      default: fail("TLS has failed: " + openssl_words());
    }
  }

  const TlsFactory::Ssl context_;
  const std::string host_;
  const bool verify_;
  bool asked_{false};  // for a certificate
  std::unique_ptr<SSL, void (*)(SSL*)> ssl_{nullptr, SSL_free};
};

#endif

/// The bytes of one exchange, as httplib reads and writes them.
///
/// The head of an answer is read whole before httplib sees it, and shortened to what it needs:
/// httplib takes as many headers as come, and puts the status line through a regular expression
/// that overflows the stack if it is long. Which of the functions override one depends on the
/// version.
class HttpStream : public httplib::Stream {
 public:
  HttpStream(Connection& connection, SteadyTime deadline, milliseconds idle, std::size_t most_head)
      : connection_(connection), deadline_(deadline),
        idle_(idle.count() > 0 ? idle : milliseconds(std::chrono::hours(24))),
        most_head_(most_head) {}

  // Not all of these are there in every httplib.
  // NOLINTBEGIN(modernize-use-override,cppcoreguidelines-explicit-virtual-functions)
  ssize_t read(char* to, std::size_t size) {
    if (head_left_ == 0 && !in_body_ && !read_head()) return -1;
    if (at_ == input_.size()) {
      auto n = fill();
      if (n <= 0) return n;
    }
    auto n = (std::min)(size, head_left_ > 0 ? head_left_ : input_.size() - at_);
    std::memcpy(to, &input_[at_], n);
    at_ += n;
    head_left_ -= (std::min)(head_left_, n);
    // httplib takes lines byte by byte: here those between the chunks.
    line_ = size == 1 && *to != '\n' ? line_ + 1 : 0;
    if (line_ > most_head_) return fail("a chunk of the answer has no length"), -1;
    return static_cast<ssize_t>(n);
  }

  /// Head and body, where they are small, go as one: two packets wake the server twice.
  ssize_t write(const char* from, std::size_t size) {
    bool fits = output_.size() + size <= kPiece;
    if (fits) output_.append(from, size);
    if (!fits && !flush()) return -1;
    return fits ? static_cast<ssize_t>(size) : send(from, size);
  }

  bool is_readable() const { return true; }
  bool is_writable() const { return true; }
  bool wait_readable() const { return true; }
  bool wait_writable() const { return true; }
  void get_remote_ip_and_port(std::string&, int&) const {}
  void get_local_ip_and_port(std::string&, int&) const {}
  socket_t socket() const { return connection_.socket(); }
  time_t duration() const { return 0; }
  // NOLINTEND(modernize-use-override,cppcoreguidelines-explicit-virtual-functions)

  /// Whether a byte of the request may have reached the server.
  bool sent() const { return sent_ && !connection_.rejected(); }
  /// Nothing is left of what has been received.
  bool drained() const { return at_ == input_.size(); }
  /// Why it has failed, as far as is known here.
  const std::string& cause() const { return cause_; }

 private:
  static constexpr std::size_t kPiece = 16384;
  static constexpr milliseconds kMostStall{10000};  // until the server takes the next bytes
  static constexpr std::string_view kBegin = "HTTP/1.";

  /// The number of bytes that the server has, or wants no more; or -1.
  ssize_t send(const char* from, std::size_t size) {
    auto until = (std::min)(deadline_, steady_clock::now() + SteadyTime::duration(kMostStall));
    auto n = refused_ ? 0 : connection_.write(from, size, until);
    if (n > 0) return sent_ = true, n;
    // Who does not want the rest of a request may have answered all the same.
    refused_ = sent_ && !connection_.cause().empty();
    if (refused_) return static_cast<ssize_t>(size);
    return note(n), -1;
  }
  bool flush() {
    for (std::size_t at = 0; at < output_.size();) {
      auto n = send(&output_[at], output_.size() - at);
      if (n < 0) return false;
      at += static_cast<std::size_t>(n);
    }
    return output_.clear(), true;
  }

  ssize_t fill() {
    if (!flush()) return -1;
    if (drained()) input_.clear(), at_ = 0;
    char piece[kPiece];  // NOLINT(cppcoreguidelines-pro-type-member-init): not for us to fill
    auto until = (std::min)(deadline_, steady_clock::now() + SteadyTime::duration(idle_));
    auto n = connection_.read(piece, kPiece, until);
    if (n <= 0) return note(n), n;
    input_.append(piece, static_cast<std::size_t>(n));
    heard_ = steady_clock::now();
    return n;
  }

  /// Why there are no more bytes.
  void note(ssize_t n) {
    cause_ = n == 0 ? std::string("the connection was closed") : connection_.cause();
    if (cause_.empty()) {
      auto silent = seconds_words(steady_clock::now() - heard_);
      cause_ = in_body_ ? "nothing more came in " + silent : "no answer in " + silent;
    } else if (is_about_its_end(cause_)) {
      cause_ += in_body_ ? " in the middle of the answer" : " before an answer came";
    }
  }

  bool fail(std::string why) { return cause_ = std::move(why), false; }

  /// Until `input_` has a head that httplib may see.
  bool read_head() {
    while (true) {
      auto bytes = std::string_view{input_}.substr(at_);
      if (bytes.substr(0, kBegin.size()) != kBegin.substr(0, bytes.size())) return no_http(bytes);
      auto end = bytes.find("\r\n\r\n");
      bool whole = end != std::string_view::npos;
      if (heads_ + (whole ? end : bytes.size()) > most_head_) {
        return fail("the head of the answer is longer than " + std::to_string(most_head_) +
                    " bytes");
      }
      if (!whole && fill() <= 0) return false;
      if (whole && !use_head(end + 4)) return false;
      if (head_left_ > 0) return true;
    }
  }

  bool use_head(std::size_t size) {
    auto bytes = std::string_view{input_}.substr(at_, size);
    auto code = bytes.substr(9, 3);
    bool odd = bytes[8] != ' ' || code.find_first_not_of("0123456789") != std::string_view::npos;
    if (odd || bytes[12] > ' ') return no_http(bytes);
    heads_ += size;
    in_body_ = code[0] != '1';
    if (!in_body_ && code != "100") return at_ += size, true;  // news on the way to the answer
    auto head = std::string(bytes.substr(0, 12)) + " -\r\n";
    for (auto at = bytes.find("\r\n") + 2; in_body_ && at + 2 < size;) {
      auto line = bytes.substr(at, bytes.find("\r\n", at) + 2 - at);
      if (is_needed(line)) head += line;
      at += line.size();
    }
    head += "\r\n";
    head_left_ = head.size();
    input_.replace(at_, size, head);
    return true;
  }

  /// Whether it says where the body ends, and what is in it. httplib reads others for nothing.
  static bool is_needed(std::string_view line) {
    static constexpr std::array<std::string_view, 4> kNames{
        "content-length:", "content-encoding:", "transfer-encoding:", "connection:"};
    return std::any_of(kNames.begin(), kNames.end(), [line](std::string_view name) {
      auto start = line.substr(0, name.size());
      return std::equal(start.begin(), start.end(), name.begin(), name.end(),
                        [](char c, char small) { return (c | 0x20) == small; });
    });
  }

  bool no_http(std::string_view bytes) {
    bool alert = bytes.substr(0, 2) == "\x15\x03";
    return fail(alert ? "http spoken to an https port"
                      : "the answer is no HTTP, but \"" + printable(bytes.substr(0, 60)) + "\"");
  }

  Connection& connection_;
  const SteadyTime deadline_;
  const milliseconds idle_;
  const std::size_t most_head_;
  std::string output_;  // not sent yet
  std::string input_;   // from at_ on it has not been handed out
  std::size_t at_{0}, head_left_{0}, heads_{0}, line_{0};
  SteadyTime heard_{steady_clock::now()};
  bool in_body_{false};
  bool sent_{false}, refused_{false};
  std::string cause_;
};

/// httplib's client, of which only the protocol is used: not its sockets, and not its TLS.
class HttpEngine : public httplib::ClientImpl {
 public:
  HttpEngine() : ClientImpl("localhost", 80) {}
  using ClientImpl::process_request;
};

class HttplibTransport : public Transport {
  using Held = std::unique_ptr<Connection>;

 public:
  HttplibTransport(TlsOptions tls, const LimitOptions& limits)
      : tls_(std::move(tls)), limits_(limits) {}
  ~HttplibTransport() override { HttplibTransport::close_idle(); }

  void close_idle() override {
    NoSigpipe guard;  // TLS says farewell, perhaps to somebody who has gone
    std::map<std::string, std::vector<Held>> closed;  // destroyed outside the lock
    std::lock_guard<std::mutex> lock(mutex_);
    closed.swap(idle_);
#ifdef CPPHTTPLIB_OPENSSL_SUPPORT
    factory_.forget();
#endif
  }

  /// Whether what is given for TLS can be used.
  Result<void> check() override {
    if (!wants_tls(tls_)) return {};
    auto made = make({true, {}, 0});
    return made ? Result<void>{} : made.error();
  }

  bool may_recover(const std::string& endpoint) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return disagreeing_.count(endpoint) == 0;
  }

  Result<HttpResponse> perform(const HttpRequest& request, const ChunkSink& sink,
                               const Context& ctx) override {
    if (ctx.done()) return context_error(ctx, "the request was not sent");
    NoSigpipe guard;  // to the end: closing TLS writes, too
    auto deadline = ctx.deadline().value_or((SteadyTime::max)());
    bool close = has_close(request);
    Held connection = close ? nullptr : take(request.endpoint);
    bool fresh = !connection;
    if (fresh) {
      auto made = make(split_endpoint(request.endpoint));
      if (!made) return made.error();
      connection = std::move(*made);
    }
    auto hook = ctx.on_cancel([raw = connection.get()] { raw->cut(); });
    if (fresh && !open(*connection, request.endpoint, deadline)) {
      remember(request.endpoint, *connection);
      return failed(ctx, "cannot connect to " + request.endpoint, connection->cause(), false);
    }
    HttpStream stream(*connection, deadline, request.idle_timeout, limits_.head);
    Exchange state;
    bool whole = run(stream, request, sink, ctx, state);
    hook.reset();
    remember(request.endpoint, *connection);
    bool reusable = whole && !state.stopped && !close && stream.drained() && !ctx.cancelled();
    if (reusable) give_back(request.endpoint, std::move(connection));
    return judge(request, state, whole, stream, ctx);
  }

 private:
  static constexpr std::size_t kMostIdle = 16;  // connections per endpoint

  struct Exchange {
    HttpResponse response;
    std::size_t line{0};  // of a stream: so far without an end
    bool stopped{false};  // by the sink
    bool too_long{false};
  };

  static bool has_close(const HttpRequest& request) {
    return std::any_of(request.headers.begin(), request.headers.end(), [](const auto& header) {
      return header.first == "Connection" && header.second == "close";
    });
  }

  /// True if the answer was read to its end, or the sink has had enough.
  bool run(HttpStream& stream, const HttpRequest& request, const ChunkSink& sink,
           const Context& ctx, Exchange& state) const {
    HttpEngine engine;
    auto http = build(request, sink, ctx, state);
    httplib::Response response;
    auto error = httplib::Error::Success;
    bool whole = engine.process_request(stream, http, response, has_close(request), error);
    if (whole) state.response.status = response.status;  // also of what cannot have a body
    return whole || state.stopped;
  }

  /// Status and body are taken by handlers: httplib 0.11 reports etcd 3.4's errors, which end in
  /// a trailer, as read errors and drops what it has read.
  httplib::Request build(const HttpRequest& request, const ChunkSink& sink, const Context& ctx,
                         Exchange& state) const {
    httplib::Request http;
    http.method = "POST";
    http.path = request.path;
    http.body = request.body;
    http.set_header("Host", request.endpoint.substr(request.endpoint.find("//") + 2));
    http.set_header("Content-Type", "application/json");
    http.set_header("User-Agent", "coordination");
    for (const auto& header : request.headers) http.set_header(header.first, header.second);
    http.response_handler = [&state](const httplib::Response& response) {
      state.response.status = response.status;
      return true;
    };
    http.content_receiver = [&](const char* data, std::size_t size, std::uint64_t, std::uint64_t) {
      if (ctx.done()) return false;
      std::string_view piece(data, size);
      bool streamed = sink && state.response.status / 100 == 2;
      return streamed ? pass_on(piece, sink, state) : keep(piece, state);
    };
    return http;
  }

  bool keep(std::string_view piece, Exchange& state) const {
    state.too_long = piece.size() > limits_.body - state.response.body.size();
    if (!state.too_long) state.response.body.append(piece);
    return !state.too_long;
  }

  bool pass_on(std::string_view piece, const ChunkSink& sink, Exchange& state) const {
    auto end = piece.rfind('\n');
    state.line = end == std::string_view::npos ? state.line + piece.size() : piece.size() - end - 1;
    state.too_long = state.line > limits_.body;
    state.stopped = !state.too_long && !sink(piece);
    return !state.too_long && !state.stopped;
  }

  Result<HttpResponse> judge(const HttpRequest& request, Exchange& state, bool whole,
                             const HttpStream& stream, const Context& ctx) {
    if (whole && !ctx.cancelled()) return std::move(state.response);
    auto what = "the request to " + request.endpoint + " failed";
    if (state.too_long) {  // a whole answer may be so long because so much was asked for
      return make_error(state.line > 0 ? ErrorCode::Connection : ErrorCode::Internal, what,
                        "the answer is longer than " + std::to_string(limits_.body) +
                            " bytes (CoordinatorOptions::limits)",
                        Outcome::MaybeApplied);
    }
    bool refused = state.response.status >= 400 && !state.response.body.empty();
    if (refused && !ctx.done()) return std::move(state.response);
    auto cause = stream.cause();
    if (cause.empty()) cause = ctx.done() ? "the answer came too late" : "the answer is no HTTP";
    // So a server that expects TLS turns http away; but so ends any server, too.
    bool no_word = cause == "the connection was closed before an answer came";
    if (no_word && is_stranger(request.endpoint)) cause += ": is it an https port?";
    return failed(ctx, what, cause, stream.sent());
  }

  void remember(const std::string& endpoint, const Connection& connection) {
    std::lock_guard<std::mutex> lock(mutex_);
    disagreeing_.erase(endpoint);
    if (connection.disagrees()) disagreeing_.insert(endpoint);
  }

  /// Whether nobody has ever answered there.
  bool is_stranger(const std::string& endpoint) {
    std::lock_guard<std::mutex> lock(mutex_);
    return endpoint.compare(0, 5, "https") != 0 && served_.count(endpoint) == 0;
  }

  static Error failed(const Context& ctx, const std::string& what, const std::string& cause,
                      bool sent) {
    auto outcome = sent ? Outcome::MaybeApplied : Outcome::NotApplied;
    if (ctx.done()) return context_error(ctx, what, cause, outcome);
    return make_error(ErrorCode::Connection, what, cause, outcome);
  }

  /// One that is still good.
  Held take(const std::string& endpoint) {
    std::vector<Held> stale;  // destroyed outside the lock
    std::lock_guard<std::mutex> lock(mutex_);
    auto& idle = idle_[endpoint];
    while (!idle.empty()) {
      auto connection = std::move(idle.back());
      idle.pop_back();
      if (connection->is_quiet()) return connection;
      stale.push_back(std::move(connection));
    }
    return nullptr;
  }

  void give_back(const std::string& endpoint, Held connection) {
    std::lock_guard<std::mutex> lock(mutex_);
    served_.insert(endpoint);
    auto& idle = idle_[endpoint];
    if (idle.size() < kMostIdle) idle.push_back(std::move(connection));
  }

  Result<Held> make(const HostPort& to) {
    if (!to.tls) return std::make_unique<Connection>();
#ifdef CPPHTTPLIB_OPENSSL_SUPPORT
    auto context = factory_.get();
    if (!context) return context.error();
    auto& name = tls_.server_name.empty() ? to.host : tls_.server_name;
    return Held(std::make_unique<TlsConnection>(*context, name, tls_.verify_server));
#else
    return make_error(ErrorCode::Validation, "cannot speak TLS to " + to.host,
                      "cpp-httplib was built without CPPHTTPLIB_OPENSSL_SUPPORT");
#endif
  }

  bool open(Connection& connection, const std::string& endpoint, SteadyTime deadline) {
    std::unique_lock<std::mutex> lock(mutex_);
    auto known = known_[endpoint];
    lock.unlock();
    if (!connection.connect(split_endpoint(endpoint), known, deadline)) return false;
    lock.lock();
    known_[endpoint] = known;
    lock.unlock();
    return connection.begin(deadline);
  }

  const TlsOptions tls_;
  const LimitOptions limits_;
#ifdef CPPHTTPLIB_OPENSSL_SUPPORT
  TlsFactory factory_{tls_};
#endif
  std::mutex mutex_;
  std::set<std::string> served_, disagreeing_;  // endpoints
  std::map<std::string, std::vector<Held>> idle_;
  std::map<std::string, std::optional<Address>> known_;  // the address that worked the last time
};

constexpr int httplib_minor(std::string_view version) {
  int number = 0;
  for (char c : version.substr(version.find('.') + 1)) {
    if (c < '0' || c > '9') break;
    number = number * 10 + (c - '0');
  }
  return number;
}
static_assert(CPPHTTPLIB_VERSION[0] != '0' || httplib_minor(CPPHTTPLIB_VERSION) >= 11,
              "coordination.hpp needs cpp-httplib 0.11 or newer");

// A library that was compiled with OpenSSL makes larger objects than a header that is not: they
// would write over each other's memory. It has this destructor.
#if !defined(CPPHTTPLIB_OPENSSL_SUPPORT) && defined(__ELF__) && defined(__GNUC__)
extern "C" __attribute__((weak)) void coordination_httplib_with_tls() __asm__(
    "_ZN7httplib9SSLClientD1Ev");
COORDINATION_API bool is_httplib_of_another_kind() {
  return coordination_httplib_with_tls != nullptr;
}
#else
COORDINATION_API bool is_httplib_of_another_kind() { return false; }
#endif

#endif

/// Says why there is none.
class MissingTransport : public Transport {
 public:
  explicit MissingTransport(Error why) : why_(std::move(why)) {}
  Result<HttpResponse> perform(const HttpRequest&, const ChunkSink&, const Context&) override {
    return why_;
  }

 private:
  const Error why_;
};

}  // namespace detail

COORDINATION_API std::shared_ptr<Transport> make_default_transport(const TlsOptions& tls,
                                                                   const LimitOptions& limits) {
#if COORDINATION_USE_HTTPLIB
  if (!detail::is_httplib_of_another_kind()) {
    return std::make_shared<detail::HttplibTransport>(tls, limits);
  }
  auto why = detail::make_error(ErrorCode::Validation, "cpp-httplib was built with other flags",
                                "compile with -DCPPHTTPLIB_OPENSSL_SUPPORT, or all that"
                                " `pkg-config --cflags cpp-httplib` says");
#else
  static_cast<void>(tls), static_cast<void>(limits);
  auto why = detail::make_error(
      ErrorCode::Unavailable, "there is no transport",
      "built with COORDINATION_USE_HTTPLIB 0: set CoordinatorOptions::transport");
#endif
  return std::make_shared<detail::MissingTransport>(std::move(why));
}

// == 5. Client ==================================================================================

namespace detail {

/// A name, an IPv4 address, or an IPv6 address in []. What is not ASCII is left to the resolver.
COORDINATION_API bool is_host(std::string_view host) {
  static constexpr std::string_view kDigits = "0123456789abcdefABCDEF:.";
  if (host.size() < 3 || host.front() != '[' || host.back() != ']') {
    return !host.empty() && std::all_of(host.begin(), host.end(), [](unsigned char c) {
      return std::isalnum(c) || c >= 0x80 || c == '-' || c == '.' || c == '_';
    });
  }
  host = host.substr(1, host.size() - 2);
  auto zone = host.find('%');
  if (zone != std::string_view::npos && !is_host(host.substr(zone + 1))) return false;
  host = host.substr(0, zone);
  return std::count(host.begin(), host.end(), ':') >= 2 &&
         host.find_first_not_of(kDigits) == std::string_view::npos;
}

/// The endpoint as "scheme://host:port"; empty if it is none.
COORDINATION_API std::string normal_endpoint(std::string endpoint, bool tls) {
  std::string scheme = tls ? "https://" : "http://";
  for (const char* known : {"http://", "https://"}) {
    if (endpoint.compare(0, std::strlen(known), known) == 0) scheme = known;
  }
  if (endpoint.compare(0, scheme.size(), scheme) == 0) endpoint.erase(0, scheme.size());
  if (!endpoint.empty() && endpoint.back() == '/') endpoint.pop_back();
  auto colon = endpoint.rfind(':');
  bool has_port = colon != std::string::npos && endpoint.find(']', colon) == std::string::npos;
  auto host = endpoint.substr(0, has_port ? colon : std::string::npos);
  auto port = has_port ? endpoint.substr(colon + 1) : std::string("2379");
  if (!is_host(host) || printable(host) != host || port.empty() || port.size() > 5) return {};
  if (port.find_first_not_of("0123456789") != std::string::npos) return {};
  auto value = std::strtol(port.c_str(), nullptr, 10);
  if (value < 1 || value > 65535) return {};
  return scheme + host + ":" + std::to_string(value);
}

/// Whether a call may be sent again after it may have been applied.
enum class Safety {
  Read,        // changes nothing
  Idempotent,  // made so that the second time changes nothing
  Write
};

/// What the answer to an attempt means.
struct Verdict {
  enum class Next { Stop, OtherMember, Wait, Login };
  Error error;
  Next next{Next::Stop};
  bool member_failed{false};
  bool applied_unknown{false};
  bool passing{false};  // nothing was done, and soon it may be: tried until the deadline
};

struct Rule {
  const char* text;  // in etcd's message
  ErrorCode code;
  Verdict::Next next;
  bool applied_unknown;
  bool member_failed;
};

/// etcd's messages, after the table in its rpctypes/error.go. The first that matches counts.
COORDINATION_API const Rule* find_rule(const std::string& message) {
  using Next = Verdict::Next;
  using Code = ErrorCode;
  static constexpr Rule kRules[] = {
      {"invalid auth token", Code::PermissionDenied, Next::Login, false, false},
      {"revision of auth store is old", Code::PermissionDenied, Next::Login, false, false},
      {"revision in header is old", Code::PermissionDenied, Next::Login, false, false},
      {"user name is empty", Code::PermissionDenied, Next::Login, false, false},
      {"authentication failed", Code::PermissionDenied, Next::Stop, false, false},
      {"permission denied", Code::PermissionDenied, Next::Stop, false, false},
      {"no leader", Code::Unavailable, Next::OtherMember, false, true},
      {"not a primary lessor", Code::Unavailable, Next::OtherMember, false, true},
      {"not supported for learner", Code::Unavailable, Next::OtherMember, false, true},
      {"leader changed", Code::Unavailable, Next::Wait, true, false},
      {"too many requests", Code::Unavailable, Next::Wait, false, false},
      {"database space exceeded", Code::Unavailable, Next::Stop, true, false},
      {"required revision has been compacted", Code::Compacted, Next::Stop, false, false},
      {"is a future revision", Code::Validation, Next::Wait, false, false},
      {"lease not found", Code::NotFound, Next::Stop, false, false},
      {"key not found", Code::NotFound, Next::Stop, false, false},
      {"lease already exists", Code::Conflict, Next::Stop, false, false},
      {"request timed out", Code::Unavailable, Next::OtherMember, true, true},
      {"deadline exceeded", Code::Timeout, Next::OtherMember, true, true},
      {"CommonName of client", Code::PermissionDenied, Next::Stop, false, false},
  };
  for (const Rule& rule : kRules) {
    if (message.find(rule.text) != std::string::npos) return &rule;
  }
  return nullptr;
}

COORDINATION_API ErrorCode code_of_grpc(int code) {
  switch (code) {
    case 1: return ErrorCode::Unavailable;
    case 3:
    case 8:
    case 11: return ErrorCode::Validation;
    case 4: return ErrorCode::Timeout;
    case 5: return ErrorCode::NotFound;
    case 6:
    case 9: return ErrorCode::Conflict;
    case 7:
    case 16: return ErrorCode::PermissionDenied;
    case 14: return ErrorCode::Unavailable;
    default: return ErrorCode::Internal;
  }
}

COORDINATION_API Verdict judge_error(const wire::EtcdError& error, const std::string& endpoint) {
  Verdict verdict;
  verdict.error = make_error(ErrorCode::Internal, "etcd at " + endpoint + " has refused",
                             printable(error.message));
  if (const Rule* rule = find_rule(error.message)) {
    verdict.error.code = rule->code;
    verdict.next = rule->next;
    verdict.applied_unknown = rule->applied_unknown;
    verdict.member_failed = rule->member_failed;
    verdict.passing = rule->code == ErrorCode::Unavailable && !rule->applied_unknown;
    return verdict;
  }
  verdict.error.code = code_of_grpc(error.code);
  bool failed = verdict.error.code == ErrorCode::Unavailable ||
                verdict.error.code == ErrorCode::Timeout || error.code == 2 || error.code == 13;
  if (!failed) return verdict;
  verdict.next = Verdict::Next::OtherMember;
  verdict.applied_unknown = true;
  verdict.member_failed = true;
  return verdict;
}

/// The beginning of an answer that is not etcd's. What looks like JSON is not shown: there may be a
/// value in it.
COORDINATION_API std::string excerpt(std::string_view body) {
  auto first = body.find_first_not_of(" \t\r\n");
  if (first == std::string_view::npos) return "nothing";
  if (body[first] == '{' || body[first] == '[') {
    return "malformed JSON of " + std::to_string(body.size()) + " bytes";
  }
  return "\"" + printable(body.substr(first, 120)) + "\"";
}

/// An answer with an HTTP status that is no success.
COORDINATION_API Verdict judge_status(const HttpResponse& response, const std::string& endpoint) {
  if (response.status == 413) {  // of a proxy's; the others have the same limit
    auto cause = "HTTP status 413; it said " + excerpt(response.body);
    return {make_error(ErrorCode::Validation, endpoint + " takes no request so large", cause)};
  }
  auto etcd = wire::decode_error_body(response.body);
  if (etcd && !etcd->message.empty() && response.status != 404) return judge_error(*etcd, endpoint);
  if (etcd && etcd->code == 5 && etcd->message != "Not Found") return judge_error(*etcd, endpoint);
  if (response.body.find("CommonName of client") != std::string::npos) {
    return judge_error({7, response.body}, endpoint);
  }
  Verdict verdict;
  verdict.next = Verdict::Next::OtherMember;
  verdict.member_failed = true;
  auto status = "HTTP status " + std::to_string(response.status);
  bool to_tls = response.status == 400 && response.body.find("HTTPS") != std::string::npos;
  auto hint = response.status == 404 ? ": its JSON gateway is off (enable-grpc-gateway), or this is"
                                       " another server"
              : to_tls               ? ": http spoken to an https port"
                                     : ": this is no etcd, or a proxy before it";
  verdict.error = make_error(ErrorCode::Unavailable, endpoint + " did not answer as etcd does",
                             status + hint + "; it said " + excerpt(response.body));
  verdict.applied_unknown = response.status >= 500;
  return verdict;
}

COORDINATION_API Verdict judge_transport(const Error& error) {
  Verdict verdict;
  verdict.error = error;
  verdict.applied_unknown = error.outcome == Outcome::MaybeApplied;
  verdict.member_failed = error.code != ErrorCode::Cancelled &&
                          error.code != ErrorCode::Validation && error.code != ErrorCode::Internal;
  verdict.next = verdict.member_failed ? Verdict::Next::OtherMember : Verdict::Next::Stop;
  verdict.passing = error.code == ErrorCode::Connection && !verdict.applied_unknown;
  return verdict;
}

COORDINATION_API Error not_etcd(const std::string& endpoint, std::string_view body) {
  return make_error(ErrorCode::Internal, endpoint + " did not answer as etcd does",
                    "not a reply of etcd's JSON gateway, but " + excerpt(body),
                    Outcome::MaybeApplied);
}

/// The members of the cluster, judged by what became of real requests. One that fails rests, the
/// longer the more often; after that one request tries it, and the others go on elsewhere.
class Members {
 public:
  Members(std::vector<std::string> urls, const Context& open) : open_(open) {
    for (auto& url : urls) members_.push_back({std::move(url), Context::child_of(open)});
  }

  std::size_t size() const { return members_.size(); }
  const std::string& url(std::size_t i) const { return members_[i].url; }
  /// Its url without the scheme.
  std::string name(std::size_t i) const { return url(i).substr(url(i).find("//") + 2); }

  std::size_t choose() {
    std::lock_guard<std::mutex> lock(mutex_);
    current_ = best({}).value_or(current_);
    auto& member = members_[current_];
    if (member.failures > 0) rest(member, steady_clock::now());
    return current_;
  }
  /// One that is not among `asked`.
  std::optional<std::size_t> another(const std::vector<std::size_t>& asked) {
    std::lock_guard<std::mutex> lock(mutex_);
    return best(asked);
  }
  void prefer(std::size_t i) {
    std::lock_guard<std::mutex> lock(mutex_);
    current_ = i;
  }

  void succeeded(std::size_t i) {
    std::lock_guard<std::mutex> lock(mutex_);
    members_[i].failures = 0;
    members_[i].rests_until = {};
    members_[i].heard = steady_clock::now();
  }
  /// True if it was well before.
  bool failed(std::size_t i) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto& member = members_[i];
    bool first = member.failures == 0;
    if (member.failures < 8) ++member.failures;
    member.identified = false;
    rest(member, steady_clock::now());
    if (current_ == i) current_ = (i + 1) % members_.size();
    return first;
  }
  /// Whether it has served a moment ago.
  bool is_fresh(std::size_t i) {
    std::lock_guard<std::mutex> lock(mutex_);
    return members_[i].identified && steady_clock::now() - members_[i].heard < kFresh;
  }

  /// The first cluster that is heard of is ours. False: this is another one.
  bool belongs(std::size_t i, std::uint64_t cluster) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (cluster_ == 0) cluster_ = cluster;
    members_[i].identified = cluster == 0 || cluster == cluster_;
    return members_[i].identified;
  }
  /// Nobody knows whose it is.
  bool is_stranger(std::size_t i) {
    std::lock_guard<std::mutex> lock(mutex_);
    return cluster_ != 0 && !members_[i].identified;
  }

  /// Ends when the member is found dead.
  Context life(std::size_t i) {
    std::lock_guard<std::mutex> lock(mutex_);
    return members_[i].life;
  }
  void bury(std::size_t i) {
    Context life = Context::child_of(open_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      std::swap(life, members_[i].life);
    }
    life.cancel();
  }
  /// One looks at a time. False: somebody does.
  bool begin_look(std::size_t i) {
    std::lock_guard<std::mutex> lock(mutex_);
    return !std::exchange(members_[i].looked_at, true);
  }
  void end_look(std::size_t i) {
    std::lock_guard<std::mutex> lock(mutex_);
    members_[i].looked_at = false;
  }

  /// The one in use.
  std::size_t current() {
    std::lock_guard<std::mutex> lock(mutex_);
    return current_;
  }

 private:
  static constexpr milliseconds kFresh{2000};

  struct Member {
    std::string url;
    Context life;
    int failures{0};
    SteadyTime rests_until{};
    SteadyTime heard{};      // when it served last
    bool identified{false};  // it is of our cluster
    bool looked_at{false};
  };

  /// The one in use or the next that does not rest, else the one whose rest ends first.
  std::optional<std::size_t> best(const std::vector<std::size_t>& except) const {
    std::optional<std::size_t> found;
    auto now = steady_clock::now();
    for (std::size_t k = 0; k < members_.size(); ++k) {
      auto i = (current_ + k) % members_.size();
      if (std::count(except.begin(), except.end(), i) > 0) continue;
      if (members_[i].rests_until <= now) return i;
      if (!found || members_[i].rests_until < members_[*found].rests_until) found = i;
    }
    return found;
  }
  static void rest(Member& member, SteadyTime now) {
    auto time = milliseconds(250) * (1 << (std::min)(member.failures, 5));
    member.rests_until = now + (std::min)(time, milliseconds(5000));
  }

  const Context open_;
  std::mutex mutex_;
  std::vector<Member> members_;
  std::size_t current_{0};
  std::uint64_t cluster_{0};
};

class LeaseKeeper;
template <class Request, class Response>
class Sharer;
class WatchHub;

/// Of a member: a request was answered; one is late, or has failed; it does not answer.
enum class Sign { Serves, Doubt, Silence };

inline constexpr milliseconds kPatient{5000};  // with a slow etcd, for what we ask ourselves

/// A unary request.
struct Call {
  std::string path;
  std::string what;  // for errors: "the put of <key>"
  std::string body;
  Safety safety;
  bool quorum{true};  // a member without one refuses at once
  bool once{false};   // one attempt: what fails is not sent again
};

COORDINATION_API std::string describe(const RangeRequest& range) {
  return "the read of " + range.key;
}
COORDINATION_API std::string describe(const PutRequest& put) { return "the put of " + put.key; }
COORDINATION_API std::string describe(const RemoveRequest& remove) {
  return "the removal of " + remove.key;
}

COORDINATION_API std::string describe(const Txn& txn) {
  if (!txn.compare.empty()) return "transaction on " + txn.compare.front().key;
  return "transaction of " + std::to_string(txn.success.size()) + " operations";
}

struct Reply {
  std::string body;
  std::size_t member{0};
  bool repeated{false};  // an earlier attempt may have been applied, too
};

/// One way to one cluster: the only place that knows endpoints, retries and tokens.
struct ClientState : std::enable_shared_from_this<ClientState> {
  CoordinatorOptions options;
  std::shared_ptr<Transport> transport;
  std::shared_ptr<Clock> clock;
  std::shared_ptr<Executor> executor;
  std::shared_ptr<const Log> log;
  Context open;                         // cancelled when the Coordinator closes
  std::atomic<bool> closing{false};     // no new leases from then on
  std::atomic<bool> contended{false};   // the lock that was asked for last
  std::atomic<std::int64_t> waited{0};  // ms, of destructors, for an etcd that does not answer
  std::shared_ptr<Sharer<RangeRequest, RangeResponse>> reads;
  std::shared_ptr<Sharer<PutRequest, PutResponse>> puts;
  std::shared_ptr<Sharer<RemoveRequest, RemoveResponse>> removals;
  std::shared_ptr<LeaseKeeper> leases;  // of section 6
  std::shared_ptr<WatchHub> watches;    // of section 7
  std::unique_ptr<Members> members;

  /// One unary call, repeated as RetryConfig and its safety allow.
  /// `accept` says whether the body of a success is etcd's, and of which cluster; 0: of any.
  using Accept = std::function<std::optional<std::uint64_t>(const std::string&)>;
  Result<Reply> call(Call request, const Context& ctx, const Accept& accept,
                     bool with_token = true);

  /// The same, decoded.
  template <class T>
  Result<T> ask(Call request, const Context& ctx, bool* repeated = nullptr) {
    T decoded;
    auto reply = call(std::move(request), ctx, [&](const std::string& answer) {
      return wire::decode_reply(answer, decoded);
    });
    if (!reply) return reply.error();
    if (repeated) *repeated = reply->repeated;
    return decoded;
  }
  Result<RangeResponse> read(const RangeRequest& request, const Context& ctx) {
    return ask<RangeResponse>({"/v3/kv/range", describe(request), wire::body(request), Safety::Read,
                               !request.serializable},
                              ctx);
  }
  /// Whether there is something: a key, without its value.
  Result<RangeResponse> peek(RangeRequest range, const Context& ctx) {
    range.limit = 1;
    range.keys_only = true;
    return read(range, ctx);
  }
  Result<PutResponse> put(const PutRequest& request, const Context& ctx) {
    return ask<PutResponse>({"/v3/kv/put", describe(request), wire::body(request), Safety::Write},
                            ctx);
  }
  Result<RemoveResponse> remove(const RemoveRequest& request, const Context& ctx) {
    return ask<RemoveResponse>(
        {"/v3/kv/deleterange", describe(request), wire::body(request), Safety::Write}, ctx);
  }
  /// `repeated`: an earlier attempt may have been applied, too.
  Result<TxnResponse> commit(const Txn& txn, Safety safety, const Context& ctx,
                             bool* repeated = nullptr) {
    return ask<TxnResponse>({"/v3/kv/txn", "the " + describe(txn), wire::body(txn), safety}, ctx,
                            repeated);
  }

  /// Where a stream was sent, and with which token.
  struct StreamPlace {
    std::atomic<std::size_t> member{0};
    std::atomic<std::uint64_t> token{0};  // its generation
    std::atomic<bool> refused{false};     // by an error in the stream
    bool must_answer{false};              // a deadline that passes is the member's failure
    bool bare{false};                     // it does not wait for a token, which it may not need
    bool needs_token{false};              // it does: the one that it had was refused
  };
  /// What an error in a stream means; draws the conclusions for member and token.
  Verdict refused(StreamPlace& place, const wire::EtcdError& error);
  /// A line of a stream, or why the stream is of no more use: that is concluded, too.
  template <class Line>
  Result<Line> read_line(StreamPlace& place, std::string_view text) {
    auto decoded = wire::decode_line<Line>(text);
    if (auto* error = std::get_if<wire::EtcdError>(&decoded)) return refused(place, *error).error;
    auto* line = std::get_if<Line>(&decoded);
    if (!line) return not_etcd(members->url(place.member), text);  // half a line, or no etcd
    if (!belongs(place.member, line->cluster)) return foreign(place.member).error;
    return std::move(*line);
  }

  /// A call of several requests has one time limit.
  Context bounded(const Context& ctx) const {
    if (ctx.deadline()) return ctx;
    return join_contexts({&ctx}, steady_clock::now() + options.timeout);
  }

  /// One request to one member. A user's transport that overruns the deadline of `ctx`, which must
  /// be this request's own, is cancelled. What it throws is an error of this request.
  Result<HttpResponse> perform(const HttpRequest& http, const ChunkSink& sink, const Context& ctx);
  /// The same, told to nobody.
  Result<HttpResponse> send(const HttpRequest& http, const ChunkSink& sink, const Context& ctx);

  /// Something on the way does not pass `Connection: close` on: see stream().
  std::atomic<bool> pads_bodies{false};

  /// One streaming request to one member; the caller repeats it. Success: the stream ended well.
  Result<void> stream(const char* path, std::string body, const ChunkSink& sink, const Context& ctx,
                      StreamPlace* place = nullptr, bool close = true);

  /// A cheap request to one member: does it serve, as one of a quorum?
  bool probe(std::size_t member, milliseconds limit);
  /// An answer of this cluster came from this member. False: that is not ours; it is out.
  bool belongs(std::size_t member, std::uint64_t cluster);
  void member_failed(std::size_t member, const Error& error);
  Verdict judge(const Result<HttpResponse>& response, std::size_t member, const Context& ctx);
  Verdict foreign(std::size_t member) const;
  /// A request to this member is late, or has failed: is it dead?
  void suspect(std::size_t member);
  /// Whether it serves, as one of a quorum; if not, its streams end, and more where it is dead.
  void look(std::size_t member, milliseconds patience);
  bool tell_streams(std::size_t member, Sign sign);  // of section 7; false: there are none
  /// When a request that ends with `ctx` is late.
  Timer::Id suspect_later(std::size_t member, const Context& ctx);
  /// Before a write for a member that was not heard of lately: who answers now is used.
  Result<void> prove(const std::string& what, const Context& ctx, bool once = false);
  /// Asks a member whose it is; false if not ours.
  bool identify(std::size_t member, const std::string& token, const Context& ctx);

  struct Login {
    std::string token;
    std::uint64_t generation{0};
    SteadyTime proven{};  // when a request with it was answered last
  };
  /// The token; waits for the login that is under way, or for one that it begins.
  Result<Login> log_in(const Context& ctx);
  /// The token as it is.
  Login present_login();
  void token_served(std::uint64_t generation);
  void token_died(std::uint64_t generation);
  /// A connection was closed without an answer: so some gateways refuse a token.
  void token_doubted(std::uint64_t generation);

  HttpRequest request(std::size_t member, const Call& call, const std::string& token,
                      const Context& ctx) const;

 private:
  bool all_disagree_on_tls() const;
  void look_at(std::size_t member, milliseconds patience);
  void authenticate();
  Result<Login> fetch_token(const Context& ctx);

  static constexpr milliseconds kLoginPause{1000};  // after one that was refused
  Gate login_gate_;                                 // its mutex guards the rest
  Login login_;
  bool logging_in_{false};
  std::uint64_t logins_{0};  // how many have ended
  std::optional<Error> login_failure_;
  SteadyTime login_failed_{};
  bool told_auth_is_off_{false};
};

/// What became of an attempt, for an error that names the member: "connection refused".
COORDINATION_API std::string reason_of(const Error& error, steady_clock::duration waited) {
  bool silent = error.code == ErrorCode::Timeout || error.code == ErrorCode::Cancelled;
  if (silent) return "no answer in " + seconds_words(waited);
  return error.cause.empty() ? error.message : error.cause;
}

/// When an answer is late: after a share of the time there is, and not before a second where that
/// leaves another one.
COORDINATION_API milliseconds lateness(const Context& ctx) {
  auto left = std::chrono::duration_cast<milliseconds>(*ctx.deadline() - steady_clock::now());
  auto late = std::clamp(left / 4, milliseconds(1000), milliseconds(2000));
  return left < 2 * late ? left / 3 : late;
}

/// One attempt of a call and, where it is late, further ones beside it at other members; but a
/// write, that may be applied twice, is sent once. The first answer wins, and nothing is cancelled
/// before there is one. It lives on in timers and threads when the call is over.
class Race : public std::enable_shared_from_this<Race> {
 public:
  struct Answer {
    std::size_t member;
    Result<HttpResponse> response;
  };

  /// `ctx` ends with the call, and has a deadline.
  Race(std::shared_ptr<ClientState> client, std::shared_ptr<const Call> call, std::string token,
       const Context& ctx)
      : client_(std::move(client)), call_(std::move(call)), token_(std::move(token)), caller_(ctx),
        ctx_(Context::child_of(ctx)), lateness_(lateness(ctx)) {}

  /// Blocks until there is an answer, or all attempts have failed: then how the first one has.
  Answer run(std::size_t member) {
    runners_.push_back({member, steady_clock::now(), {}});
    Answer mine{member, attempt(member)};
    if (was_repeated() && !record(mine)) {
      gate_.wait(caller_, [this] { return answer_ || beside_ == 0; });
    }
    ctx_.cancel();
    std::lock_guard<std::mutex> lock(gate_.mutex);
    return answer_ ? std::move(*answer_) : std::move(mine);
  }

  /// Whether it was sent to others, too.
  bool was_repeated() {
    std::lock_guard<std::mutex> lock(gate_.mutex);
    return runners_.size() > 1;
  }

  /// Of each other member that was asked: how it has failed.
  void tell(std::map<std::size_t, std::string>& reasons) {
    auto now = steady_clock::now();
    std::lock_guard<std::mutex> lock(gate_.mutex);
    for (std::size_t i = 1; i < runners_.size(); ++i) {
      auto& runner = runners_[i];
      auto silent = "no answer in " + seconds_words(now - runner.began);
      reasons[runner.member] = runner.failure.empty() ? silent : runner.failure;
    }
  }

 private:
  struct Runner {
    std::size_t member;
    SteadyTime began;
    std::string failure;
  };

  Result<HttpResponse> attempt(std::size_t member) {
    auto late = later(member);
    auto life = client_->members->life(member);
    auto context = join_contexts({&ctx_, &life});
    auto response =
        client_->perform(client_->request(member, *call_, token_, context), nullptr, context);
    client_->executor->timer.cancel(late);
    return response;
  }

  Timer::Id later(std::size_t member) {
    return client_->executor->timer.after(lateness_, [weak = weak_from_this(), member] {
      if (auto self = weak.lock()) self->is_late(member);
    });
  }

  void is_late(std::size_t member) {
    if (ctx_.done()) return;
    client_->suspect(member);
    if (client_->members->size() == 1) return;
    // It is nobody else's: is its member found dead by the next time?
    if (call_->safety == Safety::Write) return static_cast<void>(later(member));
    // What a leader had when it went is never answered, though its member serves all else.
    auto patience = call_->safety == Safety::Read ? milliseconds(0) : lateness_;
    auto& executor = *client_->executor;
    executor.run_at(steady_clock::now() + patience, executor.asides,
                    [self = shared_from_this()] { self->ask_beside(); });
  }

  void ask_beside() {
    std::size_t member = 0, index = 0;
    {
      std::lock_guard<std::mutex> lock(gate_.mutex);
      auto other = ctx_.done() ? std::nullopt : client_->members->another(asked());
      if (!other) return;
      member = *other;
      index = runners_.size();
      runners_.push_back({member, steady_clock::now(), {}});
      ++beside_;
    }
    Answer theirs{member, attempt(member)};
    bool decided = ctx_.done(), serves = decides(theirs);
    auto verdict = client_->judge(theirs.response, member, ctx_);
    bool failed = !decided && !serves && verdict.member_failed;
    if (failed) client_->member_failed(member, verdict.error);
    if (record(std::move(theirs)) && !decided) client_->members->prefer(member);
    std::lock_guard<std::mutex> lock(gate_.mutex);
    --beside_;
    auto& runner = runners_[index];
    runner.failure = reason_of(verdict.error, steady_clock::now() - runner.began);
    gate_.changed.notify_all();
  }

  /// Keeps it if it is the first answer. True: there is one.
  bool record(Answer answer) {
    {
      std::lock_guard<std::mutex> lock(gate_.mutex);
      if (!answer_ && decides(answer)) answer_ = std::move(answer);
      gate_.changed.notify_all();
      if (!answer_) return false;
    }
    ctx_.cancel();
    return true;
  }

  /// An answer of our cluster that another member would give, too.
  bool decides(const Answer& answer) const {
    auto& [member, response] = answer;
    if (!response) return false;
    wire::Nothing nothing;
    auto cluster = wire::decode_reply(response->body, nothing);
    if (response->status == 200) return cluster && client_->belongs(member, *cluster);
    auto verdict = judge_status(*response, client_->members->url(member));
    return verdict.next == Verdict::Next::Stop && !client_->members->is_stranger(member);
  }

  std::vector<std::size_t> asked() const {
    std::vector<std::size_t> members;
    for (auto& runner : runners_) members.push_back(runner.member);
    return members;
  }

  const std::shared_ptr<ClientState> client_;
  const std::shared_ptr<const Call> call_;
  const std::string token_;
  const Context caller_;
  const Context ctx_;  // of all attempts
  const milliseconds lateness_;
  Gate gate_;  // its mutex guards the rest
  std::vector<Runner> runners_;
  int beside_{0};  // attempts in other threads
  std::optional<Answer> answer_;
};

/// What a call says whose time is over, or that was cancelled.
COORDINATION_API Error ended_call(const ClientState& client, const Context& ctx,
                                  const std::string& call, std::string what, std::string cause,
                                  Outcome outcome) {
  bool closed = client.open.cancelled();
  if (closed) what = closed_error().message;
  if (ctx.cancelled()) what = call + " was cancelled";
  auto code = closed || ctx.cancelled() ? ErrorCode::Cancelled : ErrorCode::Timeout;
  return make_error(code, std::move(what), std::move(cause), outcome);
}

/// The attempts of one call.
struct Attempts {
  ClientState& client;
  const std::shared_ptr<const Call> shared;  // with attempts that outlive this
  const Call& call{*shared};
  const Context& ctx;  // the caller's
  const ClientState::Accept& accept;
  bool with_token;

  static constexpr milliseconds kWhatPasses{400};  // an election, a restart: asked for so often

  const SteadyTime begun{steady_clock::now()};
  const Context bounded;  // ends with the caller's, with the Coordinator, and in time
  Backoff backoff;
  std::size_t tried{0};          // in this round
  int all_rounds{0}, rounds{0};  // those that count: a member has failed that was there
  bool counts{false};            // this round does
  int dead_tokens{0};
  bool maybe{false};
  Verdict verdict{};                             // on the last attempt
  std::map<std::size_t, std::string> reasons{};  // why each member has failed

  Attempts(ClientState& c, Call request, const Context& x, const ClientState::Accept& a, bool t)
      : client(c), shared(std::make_shared<const Call>(std::move(request))), ctx(x), accept(a),
        with_token(t),
        bounded(join_contexts({&x, &c.open}, deadline_of(x, begun + c.options.timeout))),
        backoff(c.options.retry_config.initial_delay, c.options.retry_config.max_delay,
                c.options.retry_config.multiplier) {}

  static SteadyTime deadline_of(const Context& ctx, SteadyTime otherwise) {
    return ctx.deadline().value_or(otherwise);
  }

  Result<Reply> run() {
    if (bounded.done()) return ended(call.what + " was not sent: its time was over before");
    while (true) {
      auto reply = once();
      if (reply) return reply;
      if (!go_on()) return finished();
    }
  }

  /// One attempt; on failure `verdict` says what it means.
  Result<Reply> once() {
    auto login = with_token ? client.log_in(bounded) : ClientState::Login{};
    if (!login) return fail({login.error(), Verdict::Next::Stop});
    auto member = client.members->choose();
    if (call.safety != Safety::Read && !client.members->is_fresh(member)) {
      auto proven = client.prove(call.what, bounded, call.once);
      if (!proven) return fail({unproven(proven.error()), Verdict::Next::Stop});
      member = client.members->choose();
    }
    auto now = steady_clock::now();
    auto self = client.shared_from_this();
    auto race = std::make_shared<Race>(std::move(self), shared, login->token, bounded);
    auto [asked, response] = race->run(member);
    if (call.safety != Safety::Read && race->was_repeated()) maybe = true;
    auto taken = response && response->status == 200 ? accept(response->body) : std::nullopt;
    if (taken && client.belongs(asked, *taken)) {
      client.members->succeeded(asked);
      client.token_served(login->generation);
      return Reply{std::move(response->body), asked, maybe};
    }
    race->tell(reasons);
    verdict = taken ? client.foreign(asked) : client.judge(response, asked, bounded);
    bool refused = response && verdict.next == Verdict::Next::Stop;
    if (refused && client.members->is_stranger(asked)) {  // a refusal does not say whose it is
      bool known = client.identify(asked, login->token, bounded);
      if (!known) verdict = client.foreign(asked);
    }
    conclude(response, asked, now, login->generation);
    return verdict.error;
  }

  Error unproven(Error error) const {
    if (error.code == ErrorCode::Timeout) error.message = not_done();
    return error;
  }
  Error fail(Verdict why) {
    verdict = std::move(why);
    return verdict.error;
  }

  /// What a failure says of the member and of the token.
  void conclude(const Result<HttpResponse>& response, std::size_t member, SteadyTime sent,
                std::uint64_t generation) {
    auto waited = steady_clock::now() - sent;
    // A short deadline says nothing about the member, nor what it said before.
    bool hasty = bounded.done() && waited < milliseconds(1000);
    if (!hasty || reasons.count(member) == 0) reasons[member] = reason_of(verdict.error, waited);
    if (verdict.member_failed && !hasty) client.member_failed(member, verdict.error);
    if (response && !verdict.member_failed) client.members->succeeded(member);
    if (verdict.next == Verdict::Next::Login) client.token_died(generation);
    bool hung_up = !response && response.error().code == ErrorCode::Connection;
    if (hung_up && verdict.applied_unknown) client.token_doubted(generation);
  }

  /// Whether there is to be another attempt; waits until it is time.
  bool go_on() {
    bool unknown = verdict.applied_unknown && call.safety != Safety::Read;
    if (unknown) maybe = true;
    if (call.once || bounded.done() || verdict.next == Verdict::Next::Stop) return false;
    if (unknown && call.safety == Safety::Write) return false;
    if (verdict.next == Verdict::Next::Login) {
      if (!with_token || client.options.username.empty()) return false;
      return ++dead_tokens == 1 || pause_for(backoff.next());
    }
    counts = counts || !verdict.passing;
    bool round_over = ++tried >= client.members->size();
    if (!round_over && verdict.next == Verdict::Next::OtherMember) return true;
    auto most = client.options.retry_config.max_attempts;
    if (counts || most <= 1) ++rounds;
    tried = 0;
    auto least = milliseconds(++all_rounds < most ? 0 : 50);
    auto time = (std::max)(backoff.next(), least);
    if (!counts) time = (std::min)(time, kWhatPasses);
    counts = false;
    return rounds < (std::max)(1, most) && pause_for(time);
  }

  /// No pause is long beside the time that is left; false: it would take it all.
  bool pause_for(milliseconds time) const {
    auto left = *bounded.deadline() - steady_clock::now();
    auto share = (std::max)(std::chrono::duration_cast<milliseconds>(left) / 4, milliseconds(50));
    return left > 2 * share && pause(bounded, (std::min)(time, share));
  }

  Error finished() const {
    Error error = verdict.error;
    bool over = error.code == ErrorCode::Timeout || error.code == ErrorCode::Cancelled;
    bool stopped = verdict.next == Verdict::Next::Stop || verdict.next == Verdict::Next::Login;
    bool cut = cancelled() || (bounded.done() && (over || !verdict.passing));
    if (!stopped && cut) return ended(not_done());
    error.outcome = outcome();
    bool one = client.members->size() == 1;
    bool unreached = error.code == ErrorCode::Connection && !maybe;
    if (stopped || (one && error.code != ErrorCode::Connection)) return error;
    auto none = "none of " + std::to_string(client.members->size()) + " members ";
    if (unreached) error.message = one ? "etcd could not be reached" : none + "could be reached";
    if (!unreached) {
      error.message = (one ? "etcd has not answered " : none + "has answered ") + call.what;
    }
    error.cause = all_reasons();
    return error;
  }
  std::string not_done() const {
    return call.what + " was not done in " + seconds_words(steady_clock::now() - begun);
  }
  std::string all_reasons() const {
    std::string text;
    for (auto& [member, reason] : reasons) {
      if (!text.empty()) text += "; ";
      text += client.members->name(member) + ": " + reason;
    }
    return text;
  }

  bool cancelled() const { return ctx.cancelled() || client.open.cancelled(); }
  Outcome outcome() const { return maybe ? Outcome::MaybeApplied : Outcome::NotApplied; }

  Error ended(std::string what) const {
    return ended_call(client, ctx, call.what, std::move(what), all_reasons(), outcome());
  }
};

COORDINATION_API Result<Reply> ClientState::call(Call request, const Context& ctx,
                                                 const Accept& accept, bool with_token) {
  return Attempts(*this, std::move(request), ctx, accept, with_token).run();
}

/// Calls of one kind, by many threads, that share requests. Eight are on their way at a time, each
/// sent by its caller as if there was nobody else; those that come meanwhile gather, and go as one
/// Txn when one of those is back. With that one attempt is made: where it has certainly done
/// nothing, whatever the reason, each of its calls goes by itself, in the time that it has left.
class Batches {
 protected:
  Batches(ClientState& client, Safety safety) : client_(client), safety_(safety) {}

  static constexpr std::size_t kOnTheWay = 8, kMostOps = 64;
  static constexpr std::size_t kMostBytes = 262144, kMostOfOne = 32768;
  static constexpr milliseconds kLate{1000};   // who is away for so long is not waited for
  static constexpr milliseconds kPause{1000};  // after what was not good for sharing

  /// Of one that is on its way: until another one takes it.
  struct Place {
    SteadyTime* since;
    SteadyTime mine;
  };

  struct Batch {
    Txn txn;
    std::vector<std::size_t> callers{};  // whose its operations are
    std::size_t joined{0}, bytes{0};
    SteadyTime deadline{};  // the last one of theirs
    bool taken{false};
    Gate gate;  // its mutex guards the rest
    bool over{false};
    std::optional<Place> place{};  // there is one caller, who goes by itself
    std::optional<Error> error{};
    TxnResponse answer{};

    std::string what() const { return "the " + describe(txn); }
    std::size_t index_of(std::size_t caller) const {
      auto found = std::find(callers.begin(), callers.end(), caller);
      return static_cast<std::size_t>(found - callers.begin());
    }
    bool has(const std::string& key) const {
      return std::any_of(txn.success.begin(), txn.success.end(),
                         [&](const Op& op) { return key_of(op) == key; });
    }
    bool wait(const Context& ctx, std::optional<SteadyTime> limit = std::nullopt) {
      return gate.wait(
          ctx, [this] { return over; }, limit);
    }
    void end() {
      std::lock_guard<std::mutex> lock(gate.mutex);
      over = true;
      gate.changed.notify_all();
    }
  };
  using BatchPtr = std::shared_ptr<Batch>;

  struct Seat {
    BatchPtr batch{};  // none: it goes by itself
    std::size_t caller{0};
    std::optional<Place> place{};
  };

  static std::int64_t ticks(SteadyTime time) { return time.time_since_epoch().count(); }
  static const std::string& key_of(const Op& op) {
    if (auto* put = std::get_if<PutRequest>(&op.request)) return put->key;
    if (auto* remove = std::get_if<RemoveRequest>(&op.request)) return remove->key;
    return std::get<RangeRequest>(op.request).key;
  }

  bool shares(std::size_t size) const {
    return client_.options.share_requests && size <= kMostOfOne &&
           rests_until_ <= ticks(steady_clock::now());
  }

  std::optional<Place> enter() {
    std::lock_guard<std::mutex> lock(mutex_);
    return free_place();
  }

  /// Under the mutex.
  std::optional<Place> free_place() {
    auto now = steady_clock::now();
    for (auto& since : away_since_) {
      if (now - since > kLate) return Place{&since, since = now};
    }
    return std::nullopt;
  }

  Seat join(Op op, std::size_t size, SteadyTime deadline) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto place = free_place();
    if (place) return {nullptr, 0, place};
    bool full = waiting_.empty() || waiting_.back()->txn.success.size() >= kMostOps ||
                waiting_.back()->bytes + size > kMostBytes;
    if (full) waiting_.push_back(std::make_shared<Batch>());
    auto& batch = *waiting_.back();
    if (safety_ != Safety::Read && batch.has(key_of(op))) return {};
    batch.txn.success.push_back(std::move(op));
    batch.callers.push_back(batch.joined);
    batch.bytes += size;
    batch.deadline = (std::max)(batch.deadline, deadline);
    return {waiting_.back(), batch.joined++, std::nullopt};
  }

  /// False: it is on its way.
  bool give_up(const Seat& seat) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto& batch = *seat.batch;
    if (batch.taken) return false;
    auto i = static_cast<std::ptrdiff_t>(batch.index_of(seat.caller));
    batch.txn.success.erase(batch.txn.success.begin() + i);
    batch.callers.erase(batch.callers.begin() + i);
    if (batch.callers.empty()) {
      waiting_.erase(std::find(waiting_.begin(), waiting_.end(), seat.batch));
    }
    return true;
  }

  void leave(Place place) {
    auto batch = next(place);
    if (!batch) return;
    auto& executor = *client_.executor;
    executor.run(executor.batches,
                 [self = client_.shared_from_this(), this, batch, place] { send(batch, place); });
  }

  /// What is to be sent in this place. One call alone goes in its own thread.
  BatchPtr next(Place& place) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (*place.since != place.mine) return nullptr;
    *place.since = {};
    if (waiting_.empty()) return nullptr;
    auto batch = std::move(waiting_.front());
    waiting_.pop_front();
    batch->taken = true;
    *place.since = place.mine = steady_clock::now();
    if (batch->callers.size() > 1) return batch;
    batch->place = place;
    batch->end();
    return nullptr;
  }

  void send(BatchPtr batch, Place place) {
    while (batch) {
      attempt(*batch);
      batch->end();
      batch = next(place);
    }
  }

  void attempt(Batch& batch) {
    Call call{"/v3/kv/txn", batch.what(), wire::body(batch.txn), safety_};
    call.once = true;
    auto accept = [&](const std::string& body) {
      auto cluster = wire::decode_reply(body, batch.answer);
      return is_whole(batch) ? cluster : std::nullopt;
    };
    auto reply = client_.call(std::move(call), Context::with_deadline(batch.deadline), accept);
    if (!reply) batch.error = reply.error();
    bool good = reply && reply->body.size() <= kMostBytes;
    if (!good) rests_until_ = ticks(steady_clock::now() + kPause);
  }

  /// Whether each operation has the answer that is its own: they are in the same order.
  static bool is_whole(const Batch& batch) {
    auto& responses = batch.answer.responses;
    auto& ops = batch.txn.success;
    return std::equal(responses.begin(), responses.end(), ops.begin(), ops.end(),
                      [](const OpResponse& response, const Op& op) {
                        return response.index() == op.request.index();
                      });
  }

  /// What its caller is told of a batch that may have been done.
  static Error failed(const Batch& batch, const std::string& call) {
    Error error = *batch.error;
    auto at = error.message.find(batch.what());
    if (at != std::string::npos) error.message.replace(at, batch.what().size(), call);
    return error;
  }

  /// It was sent, and has no time left for the answer.
  Error abandoned(const std::string& call, const Context& ctx, SteadyTime begun) const {
    auto time = seconds_words(steady_clock::now() - begun);
    auto outcome = safety_ == Safety::Read ? Outcome::NotApplied : Outcome::MaybeApplied;
    return ended_call(client_, ctx, call, call + " was not done in " + time, "no answer in " + time,
                      outcome);
  }

  ClientState& client_;
  const Safety safety_;
  std::atomic<std::int64_t> rests_until_{0};
  std::mutex mutex_;  // guards the rest
  std::array<SteadyTime, kOnTheWay> away_since_{};
  std::deque<BatchPtr> waiting_;
};

template <class Request, class Response>
class Sharer : Batches {
 public:
  using Alone = Result<Response> (ClientState::*)(const Request&, const Context&);

  Sharer(ClientState& client, Safety safety, Alone alone)
      : Batches(client, safety), alone_(alone) {}

  Result<Response> call(const Request& request, const Context& given) {
    auto alive = client_.shared_from_this();  // this too, where exit() overtakes a call
    if (!shares(size_of(request))) return go(request, given);
    auto place = enter();
    if (place) return go(request, given, place);
    auto ctx = client_.bounded(given);
    auto seat = join({request}, size_of(request), *ctx.deadline());
    auto& batch = seat.batch;
    if (!batch) return go(request, ctx, seat.place);
    auto begun = steady_clock::now();
    auto waits = join_contexts({&ctx, &client_.open});
    if (!batch->wait(waits, begun + lateness(ctx)) && give_up(seat)) return go(request, ctx);
    if (!batch->wait(waits)) return abandoned(describe(request), ctx, begun);
    if (batch->place) return go(request, ctx, batch->place);
    if (!batch->error) {
      return std::get<Response>(std::move(batch->answer.responses[batch->index_of(seat.caller)]));
    }
    if (batch->error->outcome == Outcome::NotApplied) return go(request, ctx);
    return failed(*batch, describe(request));
  }

 private:
  static std::size_t size_of(const Request& request) {
    if constexpr (std::is_same_v<Request, PutRequest>) {
      return request.key.size() + request.value.size();
    } else {
      return request.key.size();
    }
  }

  Result<Response> go(const Request& request, const Context& ctx,
                      const std::optional<Place>& place = std::nullopt) {
    auto done = (client_.*alone_)(request, ctx);
    if (place) leave(*place);
    return done;
  }

  const Alone alone_;
};

/// Of a member that was found dead.
COORDINATION_API Error silent_member(Outcome outcome) {
  return make_error(ErrorCode::Unavailable, "a member is dead",
                    "it is silent while another one answers", outcome);
}

COORDINATION_API bool ClientState::all_disagree_on_tls() const {
  std::size_t count = 0;
  while (count < members->size() && !transport->may_recover(members->url(count))) ++count;
  return count == members->size();
}

/// What the answer of a member means, or that there was none. `ctx`: of the call, all attempts.
COORDINATION_API Verdict ClientState::judge(const Result<HttpResponse>& response,
                                            std::size_t member, const Context& ctx) {
  Verdict verdict;
  if (!response) {
    verdict = judge_transport(response.error());
    verdict.passing = verdict.passing && !all_disagree_on_tls();
    bool ours = ctx.cancelled() || open.cancelled();
    if (response.error().code == ErrorCode::Cancelled && !ours) {
      verdict.next = Verdict::Next::OtherMember;
      verdict.member_failed = true;
      verdict.error.code = ErrorCode::Timeout;  // the watchdog was needed
      if (!ctx.done()) verdict.error = silent_member(verdict.error.outcome);
    }
  } else if (response->status == 200) {
    verdict = {not_etcd(members->url(member), response->body), Verdict::Next::OtherMember, true,
               true, false};
  } else {
    verdict = judge_status(*response, members->url(member));
  }
  if (ctx.cancelled() || open.cancelled()) verdict.member_failed = false;
  return verdict;
}

COORDINATION_API Verdict ClientState::foreign(std::size_t member) const {
  auto error = make_error(ErrorCode::Connection, members->url(member) + " was not used",
                          "it belongs to another cluster");
  return {error, Verdict::Next::OtherMember, true, false, true};
}

COORDINATION_API bool ClientState::belongs(std::size_t member, std::uint64_t cluster) {
  if (members->belongs(member, cluster)) return true;
  member_failed(member, foreign(member).error);
  return false;
}

COORDINATION_API HttpRequest ClientState::request(std::size_t member, const Call& call,
                                                  const std::string& token,
                                                  const Context& ctx) const {
  HttpRequest request;
  request.endpoint = members->url(member);
  request.path = call.path;
  request.body = call.body;
  request.headers.reserve(3);
  if (!token.empty()) request.headers.emplace_back("Authorization", token);
  if (call.quorum) request.headers.emplace_back("Grpc-Metadata-hasleader", "true");
  if (ctx.deadline()) {
    auto left = std::chrono::ceil<milliseconds>(*ctx.deadline() - steady_clock::now()).count();
    auto most = std::int64_t{99999999};  // eight digits
    auto time = std::clamp(static_cast<std::int64_t>(left), std::int64_t{1}, most);
    request.headers.emplace_back("Grpc-Timeout", std::to_string(time) + "m");
  }
  return request;
}

COORDINATION_API Result<HttpResponse> ClientState::perform(const HttpRequest& http,
                                                           const ChunkSink& sink,
                                                           const Context& ctx) {
  if (!options.on_request) return send(http, sink, ctx);
  RequestEvent event;
  auto count = [&](std::string_view bytes) {
    event.bytes_received += bytes.size();
    return sink(bytes);
  };
  auto began = steady_clock::now();
  auto response = send(http, sink ? ChunkSink(count) : nullptr, ctx);
  auto took = steady_clock::now() - began;
  event.duration = std::chrono::duration_cast<std::chrono::microseconds>(took);
  event.path = http.path;
  event.endpoint = http.endpoint;
  event.bytes_sent = http.body.size();
  if (!response) event.error = response.error();
  if (response) event.status = response->status;
  if (response) event.bytes_received += response->body.size();
  log->tell([handler = options.on_request, event = std::move(event)] { handler(event); });
  return response;
}

COORDINATION_API Result<HttpResponse> ClientState::send(const HttpRequest& http,
                                                        const ChunkSink& sink, const Context& ctx) {
  Result<HttpResponse> response = HttpResponse{};
  auto perform = [&] { response = transport->perform(http, sink, ctx); };
  std::optional<std::string> thrown;
  if (!ctx.deadline() || !options.transport) {  // our own keeps deadlines
    thrown = guarded(perform);
  } else {
    auto late = *ctx.deadline() + milliseconds(20);
    auto watchdog = executor->timer.at(late, [ctx] { ctx.cancel(); });
    thrown = guarded(perform);
    executor->timer.cancel(watchdog);
  }
  if (!thrown) return response;
  return make_error(ErrorCode::Connection, "the request to " + http.endpoint + " failed", *thrown,
                    Outcome::MaybeApplied);
}

COORDINATION_API Result<void> ClientState::stream(const char* path, std::string body,
                                                  const ChunkSink& sink, const Context& ctx,
                                                  StreamPlace* place, bool close) {
  auto token = place && place->bare ? present_login() : log_in(ctx);
  if (!token) return token.error();
  auto member = members->choose();
  auto life = members->life(member);
  Context context = join_contexts({&ctx, &life});
  Call call{path, {}, std::move(body), Safety::Read};
  auto http = request(member, call, token->token, {});
  // Without it etcd's gateway throws away what it has not read when its first answer is sent, but
  // for a small body, which has been read by then, and one that is too large to be thrown away.
  if (close) http.headers.emplace_back("Connection", "close");
  if (close && pads_bodies && http.body.size() > 512)
    http.body.append(std::size_t{260} * 1024, ' ');
  // A watch hears at least progress, every ten minutes.
  http.idle_timeout = std::chrono::minutes(25);
  if (place) {
    place->member = member;
    place->token = token->generation;
  }
  auto doubt = place && place->must_answer ? suspect_later(member, ctx) : Timer::Id{};
  auto response = perform(http, sink, context);
  executor->timer.cancel(doubt);
  if (response && response->status == 200) {
    if (!place || !place->refused) members->succeeded(member);
    return {};
  }
  auto verdict =
      response ? judge_status(*response, members->url(member)) : judge_transport(response.error());
  bool late = !response && context.done();
  if (late) verdict.member_failed = place && place->must_answer;
  bool ours = ctx.cancelled() || open.cancelled();
  if (verdict.member_failed && !ours) member_failed(member, verdict.error);
  if (verdict.next == Verdict::Next::Login) token_died(token->generation);
  if (place) place->needs_token = verdict.next == Verdict::Next::Login;
  return verdict.error;
}

COORDINATION_API Verdict ClientState::refused(StreamPlace& place, const wire::EtcdError& error) {
  auto verdict = judge_error(error, members->url(place.member));
  place.refused = true;
  place.needs_token = verdict.next == Verdict::Next::Login;
  if (place.needs_token) token_died(place.token);
  if (verdict.member_failed) member_failed(place.member, verdict.error);
  return verdict;
}

COORDINATION_API void ClientState::member_failed(std::size_t member, const Error& error) {
  tell_streams(member, Sign::Doubt);
  if (!members->failed(member)) return;
  (*log)(LogLevel::Warn, "a member has failed",
         {{"endpoint", members->url(member)}, {"cause", to_string(error)}});
}

COORDINATION_API Call knock_call(const ClientState& client, std::string what) {
  RangeRequest range;
  range.key = client.options.key_prefix + "/";
  range.keys_only = true;
  return {"/v3/kv/range", std::move(what), wire::body(range), Safety::Read};
}

/// Whether an error says that etcd cannot be reached, and not only that it refuses.
COORDINATION_API bool is_out_of_reach(const Error& error) {
  return error.code == ErrorCode::Connection || error.code == ErrorCode::Timeout ||
         error.code == ErrorCode::Unavailable || error.code == ErrorCode::Cancelled;
}

COORDINATION_API Result<void> ClientState::prove(const std::string& what, const Context& ctx,
                                                 bool once) {
  auto knocks = knock_call(*this, what);
  knocks.once = once;
  auto reply = call(std::move(knocks), ctx, [](const std::string& answer) {
    wire::Nothing nothing;
    return wire::decode_reply(answer, nothing);
  });
  if (reply) return members->prefer(reply->member), Result<void>();
  bool refused = reply.error().cause.find("permission denied") != std::string::npos;
  return refused ? Result<void>() : reply.error();  // this one key: it serves
}

/// Is there an etcd that serves us?
COORDINATION_API Result<void> knock(ClientState& client, const Context& given) {
  auto answer = client.prove("the first read", client.bounded(given));
  if (answer) return {};
  auto error = answer.error();
  if (error.cause.find("user name is empty") != std::string::npos) {
    error.message = "etcd demands a login: set CoordinatorOptions::username and password";
  }
  return error;
}

COORDINATION_API bool ClientState::identify(std::size_t member, const std::string& token,
                                            const Context& ctx) {
  auto context = join_contexts({&ctx});
  auto http = request(member, knock_call(*this, {}), token, context);
  auto response = perform(http, nullptr, context);
  if (!response) return false;
  wire::Nothing nothing;
  auto cluster = wire::decode_reply(response->body, nothing);
  return belongs(member, cluster.value_or(0));  // who refuses this one key does not tell
}

COORDINATION_API Timer::Id ClientState::suspect_later(std::size_t member, const Context& ctx) {
  return executor->timer.after(lateness(ctx), [weak = weak_from_this(), member] {
    if (auto self = weak.lock()) self->suspect(member);
  });
}

COORDINATION_API void ClientState::suspect(std::size_t member) {
  bool has_streams = tell_streams(member, Sign::Doubt);
  if (has_streams || members->size() > 1) look(member, milliseconds(1000));
}

COORDINATION_API void ClientState::look(std::size_t member, milliseconds patience) {
  if (!members->begin_look(member)) return;
  executor->run(executor->streams, [weak = weak_from_this(), member, patience] {
    if (auto self = weak.lock()) self->look_at(member, patience);
  });
}

/// Slow is not dead: a member is, if it is silent while another one answers. Where none does it has
/// more and more time to answer; then its streams end, and its calls have all that they were given.
COORDINATION_API void ClientState::look_at(std::size_t member, milliseconds patience) {
  bool serves = false, dead = false;
  for (int round = 0; round < 3 && !serves && !dead && !open.cancelled(); ++round) {
    serves = probe(member, patience + round * milliseconds(1000));
    if (!serves) tell_streams(member, Sign::Doubt);
    for (std::size_t i = 0; i < members->size() && !serves && !dead; ++i) {
      dead = i != member && probe(i, milliseconds(1000));
    }
  }
  members->end_look(member);
  if (open.cancelled()) return;
  if (!serves) member_failed(member, silent_member(Outcome::NotApplied));
  if (dead) return members->bury(member);
  tell_streams(member, serves ? Sign::Serves : Sign::Silence);
}

COORDINATION_API bool ClientState::probe(std::size_t member, milliseconds limit) {
  auto context = join_contexts({&open}, steady_clock::now() + limit);
  auto http = request(member, knock_call(*this, {}), present_login().token, context);
  auto response = perform(http, nullptr, context);
  if (!response) return false;
  wire::Nothing nothing;
  auto cluster = wire::decode_reply(response->body, nothing);
  if (cluster && !belongs(member, *cluster)) return false;
  return response->status / 100 == 2 || response->status / 100 == 4;
}

// One login at a time, in a thread of its own; who needs it waits for its result, also for a
// refusal.

COORDINATION_API Result<ClientState::Login> ClientState::log_in(const Context& ctx) {
  if (options.username.empty()) return Login{};
  auto wait = join_contexts({&ctx, &open});
  while (true) {
    std::uint64_t before = 0;
    bool begin = false;
    {
      std::lock_guard<std::mutex> lock(login_gate_.mutex);
      if (login_.generation != 0) return login_;
      if (login_failure_ && steady_clock::now() < login_failed_ + kLoginPause) {
        return *login_failure_;
      }
      before = logins_;
      begin = !std::exchange(logging_in_, true);
    }
    if (begin) {
      executor->run(executor->logins, [weak = weak_from_this()] {
        if (auto self = weak.lock()) self->authenticate();
      });
    }
    if (!login_gate_.wait(wait, [&] { return logins_ != before; })) break;
  }
  if (open.cancelled()) return closed_error();
  return context_error(wait, "could not log in as " + options.username);
}

COORDINATION_API void ClientState::authenticate() {
  auto enough = (std::max)(options.timeout, milliseconds(5000));
  auto result = fetch_token(join_contexts({&open}, steady_clock::now() + enough));
  std::lock_guard<std::mutex> lock(login_gate_.mutex);
  ++logins_;
  logging_in_ = false;
  login_failure_.reset();
  if (result) {
    login_ = *result;
  } else {
    login_failure_ = result.error();
    login_failed_ = steady_clock::now();
  }
  login_gate_.changed.notify_all();
}

COORDINATION_API Result<ClientState::Login> ClientState::fetch_token(const Context& ctx) {
  Login fresh;
  fresh.generation = random_number() | 1;
  fresh.proven = steady_clock::now();
  wire::Token token;
  auto is_token = [&](const std::string& answer) {
    auto cluster = wire::decode_reply(answer, token);
    return token.text.empty() ? std::nullopt : cluster;
  };
  auto reply = call({"/v3/auth/authenticate", "the login",
                     wire::login_body(options.username, options.password), Safety::Read},
                    ctx, is_token, false);
  if (!reply) {
    bool off = reply.error().cause.find("authentication is not enabled") != std::string::npos;
    if (off && !std::exchange(told_auth_is_off_, true)) {
      (*log)(LogLevel::Warn, "a login was given, but authentication is off in etcd",
             {{"user", options.username}});
    }
    if (off) return fresh;
    Error error = reply.error();
    error.message = "cannot log in as " + options.username + ": " + error.message;
    return error;
  }
  fresh.token = token.text;
  (*log)(LogLevel::Info, "logged in",
         {{"user", options.username}, {"endpoint", members->url(reply->member)}});
  return fresh;
}

COORDINATION_API ClientState::Login ClientState::present_login() {
  std::lock_guard<std::mutex> lock(login_gate_.mutex);
  return login_;
}

COORDINATION_API void ClientState::token_served(std::uint64_t generation) {
  if (generation == 0) return;
  std::lock_guard<std::mutex> lock(login_gate_.mutex);
  if (login_.generation == generation) login_.proven = steady_clock::now();
}

COORDINATION_API void ClientState::token_died(std::uint64_t generation) {
  std::lock_guard<std::mutex> lock(login_gate_.mutex);
  if (login_.generation == generation) login_ = Login{};
}

COORDINATION_API void ClientState::token_doubted(std::uint64_t generation) {
  std::lock_guard<std::mutex> lock(login_gate_.mutex);
  bool proven = steady_clock::now() - login_.proven < milliseconds(1000);
  if (login_.generation == generation && !proven) login_ = Login{};
}

COORDINATION_API std::int64_t seconds_up(milliseconds time) {
  return std::chrono::ceil<std::chrono::seconds>(time).count();
}

}  // namespace detail

COORDINATION_API std::string prefix_range_end(std::string_view prefix) {
  std::string end(prefix);
  while (!end.empty() && static_cast<unsigned char>(end.back()) == 0xff) end.pop_back();
  if (end.empty()) return std::string(1, '\0');  // to the last key of all
  end.back() = static_cast<char>(static_cast<unsigned char>(end.back()) + 1);
  return end;
}

namespace detail {
COORDINATION_API Compare compare_number(std::string key, Compare::Target target, Compare::Is is,
                                        std::int64_t number) {
  Compare compare;
  compare.key = std::move(key);
  compare.target = target;
  compare.is = is;
  compare.number = number;
  return compare;
}
}  // namespace detail

COORDINATION_API Compare Compare::create_revision(std::string key, Is is, std::int64_t revision) {
  return detail::compare_number(std::move(key), Target::Create, is, revision);
}
COORDINATION_API Compare Compare::mod_revision(std::string key, Is is, std::int64_t revision) {
  return detail::compare_number(std::move(key), Target::Mod, is, revision);
}
COORDINATION_API Compare Compare::version(std::string key, Is is, std::int64_t version) {
  return detail::compare_number(std::move(key), Target::Version, is, version);
}
COORDINATION_API Compare Compare::lease(std::string key, Is is, std::int64_t lease) {
  return detail::compare_number(std::move(key), Target::Lease, is, lease);
}
COORDINATION_API Compare Compare::value(std::string key, Is is, std::string value) {
  Compare compare = detail::compare_number(std::move(key), Target::Value, is, 0);
  compare.bytes = std::move(value);
  return compare;
}
COORDINATION_API Compare Compare::exists(std::string key) {
  return create_revision(std::move(key), Is::Greater, 0);
}
COORDINATION_API Compare Compare::missing(std::string key) {
  return create_revision(std::move(key), Is::Equal, 0);
}

COORDINATION_API Op Op::range(RangeRequest request) { return {std::move(request)}; }
COORDINATION_API Op Op::get(std::string key) {
  RangeRequest request;
  request.key = std::move(key);
  return {std::move(request)};
}
COORDINATION_API Op Op::put(std::string key, std::string value, std::int64_t lease) {
  PutRequest request;
  request.key = std::move(key);
  request.value = std::move(value);
  request.lease = lease;
  return {std::move(request)};
}
COORDINATION_API Op Op::put(PutRequest request) { return {std::move(request)}; }
COORDINATION_API Op Op::remove(std::string key) {
  RemoveRequest request;
  request.key = std::move(key);
  return {std::move(request)};
}
COORDINATION_API Op Op::remove(RemoveRequest request) { return {std::move(request)}; }
COORDINATION_API Op Op::txn(Txn txn) { return {std::make_shared<const Txn>(std::move(txn))}; }

COORDINATION_API const RangeResponse& TxnResponse::range(std::size_t i) const {
  static const RangeResponse kEmpty;
  if (i >= responses.size()) return kEmpty;
  auto* range = std::get_if<RangeResponse>(&responses[i]);
  return range ? *range : kEmpty;
}

namespace detail {

COORDINATION_API Error empty_key() { return invalid("a key is empty"); }

COORDINATION_API Result<void> validate_put(const PutRequest& put) {
  if (put.key.empty()) return empty_key();
  bool value = put.ignore_value && !put.value.empty();
  bool lease = put.ignore_lease && put.lease != 0;
  if (!value && !lease) return {};
  return invalid(std::string("the ") + (value ? "value" : "lease") + " for " + put.key +
                 " is given, and to be ignored");
}

COORDINATION_API Result<void> validate_txn(const Txn& txn) {
  for (auto* branch : {&txn.success, &txn.failure}) {
    for (const Op& op : *branch) {
      auto* put = std::get_if<PutRequest>(&op.request);
      auto* nested = std::get_if<std::shared_ptr<const Txn>>(&op.request);
      auto valid = put ? validate_put(*put) : nested ? validate_txn(**nested) : Result<void>();
      if (!valid) return valid;
    }
  }
  return {};
}

}  // namespace detail

COORDINATION_API Result<KeyValue> Client::get(std::string key, Context ctx) {
  if (key.empty()) return detail::empty_key();
  RangeRequest request;
  request.key = key;
  auto response = state_->reads->call(request, ctx);
  if (!response) return response.error();
  if (!response->kvs.empty()) return std::move(response->kvs.front());
  return detail::make_error(ErrorCode::NotFound, "there is no key " + key);
}

COORDINATION_API Result<RangeResponse> Client::range(RangeRequest request, Context ctx) {
  if (request.key.empty() && request.range_end.empty()) return detail::empty_key();
  return state_->read(request, ctx);
}

COORDINATION_API Result<PutResponse> Client::put(std::string key, std::string value, Context ctx) {
  PutRequest request;
  request.key = std::move(key);
  request.value = std::move(value);
  if (request.key.empty()) return detail::empty_key();
  return state_->puts->call(request, ctx);
}

COORDINATION_API Result<PutResponse> Client::put(PutRequest request, Context ctx) {
  auto valid = detail::validate_put(request);
  if (!valid) return valid.error();
  return state_->put(request, ctx);
}

COORDINATION_API Result<RemoveResponse> Client::remove(std::string key, Context ctx) {
  RemoveRequest request;
  request.key = std::move(key);
  if (request.key.empty()) return detail::empty_key();
  return state_->removals->call(request, ctx);
}

COORDINATION_API Result<RemoveResponse> Client::remove(RemoveRequest request, Context ctx) {
  if (request.key.empty() && request.range_end.empty()) return detail::empty_key();
  return state_->remove(request, ctx);
}

COORDINATION_API Result<TxnResponse> Client::commit(Txn txn, Context ctx) {
  auto valid = detail::validate_txn(txn);
  if (!valid) return valid.error();
  return state_->commit(txn, detail::Safety::Write, ctx);
}

COORDINATION_API Result<void> Client::compact(std::int64_t revision, Context ctx) {
  auto done = state_->ask<detail::wire::Nothing>(
      {"/v3/kv/compaction", "the compaction", detail::wire::compaction_body(revision),
       detail::Safety::Idempotent},
      ctx);
  if (done || done.error().code == ErrorCode::Compacted) return {};
  return done.error();
}

COORDINATION_API Result<Status> Client::status(Context ctx) {
  Status status;
  auto is_status = [&](const std::string& answer) {
    return detail::wire::decode_reply(answer, status);
  };
  auto reply = state_->call(
      {"/v3/maintenance/status", "the status", "{}", detail::Safety::Read, false}, ctx, is_status);
  if (!reply) return reply.error();
  status.endpoint = state_->members->url(reply->member);
  return status;
}

namespace detail {

/// It stands in the request's first line as it is.
COORDINATION_API bool is_path(std::string_view path) {
  return !path.empty() && path[0] == '/' && std::all_of(path.begin(), path.end(), [](char c) {
    return c > ' ' && c < '\x7f' && c != '?' && c != '#';
  });
}

inline constexpr std::int64_t kPage = 1000;  // keys in one answer

using Records = std::pair<std::vector<KeyValue>, std::int64_t>;  // and the revision of the read

COORDINATION_API Result<Records> read_pages(ClientState& client, RangeRequest request,
                                            const Context& ctx) {
  std::vector<KeyValue> kvs;
  request.limit = request.range_end.empty() ? 0 : kPage;
  while (true) {
    auto page = client.read(request, ctx);
    if (!page) return page.error();
    for (auto& kv : page->kvs) kvs.push_back(std::move(kv));
    if (request.revision == 0) request.revision = page->revision;
    if (!page->more || kvs.empty()) return std::make_pair(std::move(kvs), request.revision);
    request.key = kvs.back().key + '\0';
  }
}

/// A range at one revision, in pages; once more if a compaction overtakes it.
COORDINATION_API Result<Records> read_range(ClientState& client, const RangeRequest& request,
                                            const Context& ctx) {
  auto all = read_pages(client, request, ctx);
  if (all || all.error().code != ErrorCode::Compacted) return all;
  return read_pages(client, request, ctx);
}

/// What a destructor does with etcd: while that does not answer, all of a Coordinator's have half a
/// second together; what close() has left of one second is its own.
template <class Fn>
void within_patience(ClientState& client, Fn fn) {
  auto left = (std::max)(milliseconds(0), milliseconds(500 - client.waited));
  auto began = steady_clock::now();
  auto done = fn(Context::with_timeout(left));
  if (done || !is_out_of_reach(done.error())) return;
  auto took = std::chrono::duration_cast<milliseconds>(steady_clock::now() - began);
  client.waited += took.count();
}

/// What was known of the store at a moment, by which it is known again when it was away: it may
/// have come back wiped, or restored.
struct Past {
  std::int64_t seen{0};  // its revision
  KeyValue known;        // was there, if its mod_revision is not 0
  RangeRequest range;    // of it, or of whatever may be read
};

/// Remembers it.
class Witness {
 public:
  void see(std::int64_t revision) { raise_to(seen_, revision); }
  std::int64_t seen() const { return seen_; }
  void remember(const KeyValue& kv) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (kv.mod_revision <= known_.mod_revision) return;
    known_ = {kv.key, {}, kv.create_revision, kv.mod_revision, kv.version, kv.lease};
  }
  /// The store is another one now.
  void forget(std::int64_t revision) {
    std::lock_guard<std::mutex> lock(mutex_);
    known_ = {};
    seen_ = revision;
  }
  /// `range` is what can be read where no key is known.
  Past past(RangeRequest range) const {
    std::lock_guard<std::mutex> lock(mutex_);
    if (known_.mod_revision > 0) range.key = known_.key, range.range_end.clear();
    return {seen_, known_, std::move(range)};
  }

 private:
  mutable std::mutex mutex_;
  KeyValue known_;  // the last one
  std::atomic<std::int64_t> seen_{0};
};

enum class History { Same, Doubtful, Another };

/// Whether a key that we know still has its revision tells; and where the store is now.
COORDINATION_API Result<std::pair<History, std::int64_t>> compare(ClientState& client,
                                                                  const Past& past) {
  auto has_it = [&](const RangeResponse& there) {
    if (there.kvs.empty()) return false;
    auto &found = there.kvs.front(), &known = past.known;
    return found.mod_revision == known.mod_revision && found.version == known.version &&
           found.create_revision == known.create_revision;
  };
  auto now = client.peek(past.range, Context::with_timeout(kPatient));
  if (!now && is_out_of_reach(now.error())) return now.error();
  if (!now) return std::make_pair(History::Doubtful, past.seen);
  if (now->revision < past.seen) return std::make_pair(History::Another, now->revision);
  if (past.known.mod_revision == 0) return std::make_pair(History::Doubtful, now->revision);
  if (has_it(*now)) return std::make_pair(History::Same, now->revision);
  auto range = past.range;  // it was changed since, or was never there
  range.revision = past.known.mod_revision;
  auto then = client.peek(range, Context::with_timeout(kPatient));
  if (!then && is_out_of_reach(then.error())) return then.error();
  auto history = !then ? History::Doubtful : has_it(*then) ? History::Same : History::Another;
  return std::make_pair(history, now->revision);
}

}  // namespace detail

COORDINATION_API Result<nlohmann::json> Client::call(std::string path, const nlohmann::json& body,
                                                     Effect effect, Context ctx) {
  if (!detail::is_path(path)) return detail::invalid("\"" + path + "\" is no path of a request");
  auto text = detail::wire::any_body(body);
  if (text.empty()) return detail::invalid("the body for " + path + " is no JSON object");
  nlohmann::json answer;
  auto keep = [&](const std::string& bytes) { return detail::wire::decode_any(bytes, answer); };
  bool reads = effect == Effect::Reads;
  auto safety = reads ? detail::Safety::Read : detail::Safety::Write;
  auto reply =
      state_->call({path, "the call of " + path, std::move(text), safety, !reads}, ctx, keep);
  if (!reply) return reply.error();
  return answer;
}

COORDINATION_API Result<nlohmann::json> Client::call(std::string path, const nlohmann::json& body,
                                                     Context ctx) {
  return call(std::move(path), body, Effect::Writes, std::move(ctx));
}

// == 6. Lease ===================================================================================

namespace detail {

/// As etcdctl shows it, and as it stands in keys.
COORDINATION_API std::string lease_hex(std::int64_t lease) {
  std::array<char, 17> text{};
  std::snprintf(text.data(), text.size(), "%llx", static_cast<unsigned long long>(lease));
  return text.data();
}

/// One lease. Its deadline is local and never later than etcd's: the time at which the last
/// successful renewal was sent, plus the TTL.
struct LeaseState {
  enum class Phase { Live, Lost, Released };

  LeaseState(std::int64_t lease_id, std::shared_ptr<Clock> c, std::shared_ptr<Strand> strand)
      : id(lease_id), clock(std::move(c)), loss(std::move(strand)) {}

  const std::int64_t id;
  const std::shared_ptr<Clock> clock;
  std::shared_ptr<ClientState> client;
  milliseconds asked{0};                // the TTL that was asked for
  std::atomic<std::int64_t> ttl_ms{0};  // the one that was granted
  std::atomic<std::int64_t> deadline_ns{0};
  std::atomic<Phase> phase{Phase::Live};
  std::atomic<bool> tainted{false};  // a put with it may still be under way: not to be kept
  SteadyTime due{};                  // of the next renewal; the keeper's mutex guards it
  Context life;                      // cancelled when it is lost or released
  LossSignal loss;                   // for the user's handler
  std::mutex hook_mutex;
  std::function<void(const Error&)> hook;  // for the library's own: called at once, must be short

  milliseconds ttl() const { return milliseconds(ttl_ms); }
  SteadyTime deadline() const { return SteadyTime(std::chrono::nanoseconds(deadline_ns.load())); }
  bool held() const { return phase == Phase::Live && clock->now() < deadline(); }

  void renewed(SteadyTime sent, std::int64_t seconds) {
    auto longest = std::chrono::duration_cast<std::chrono::seconds>(kLongest).count();
    auto granted = std::chrono::seconds((std::min<std::int64_t>)(seconds, longest));
    ttl_ms = milliseconds(granted).count();
    auto until = sent + granted;
    raise_to(deadline_ns, std::chrono::nanoseconds{until.time_since_epoch()}.count());
  }

  void set_hook(std::function<void(const Error&)> fn) {
    std::lock_guard<std::mutex> lock(hook_mutex);
    hook = std::move(fn);
  }

  /// Live -> Lost; true the first time.
  bool lose(const Error& error) {
    auto live = Phase::Live;
    if (!phase.compare_exchange_strong(live, Phase::Lost)) return false;
    std::function<void(const Error&)> fn;
    {
      std::lock_guard<std::mutex> lock(hook_mutex);
      fn.swap(hook);
    }
    if (fn) fn(error);
    loss.fire(error);
    life.cancel();
    return true;
  }

  /// Live -> Released; true the first time.
  bool release() {
    auto live = Phase::Live;
    if (!phase.compare_exchange_strong(live, Phase::Released)) return false;
    set_hook(nullptr);
    life.cancel();
    return true;
  }
};

using LeasePtr = std::shared_ptr<LeaseState>;

/// Keeps all leases of a Coordinator alive: one task, one request for all that are due.
/// After etcd's clientv3/lease.go (a third of the TTL), with the deadline counted from sending.
class LeaseKeeper : public std::enable_shared_from_this<LeaseKeeper> {
 public:
  explicit LeaseKeeper(std::weak_ptr<ClientState> client) : client_(std::move(client)) {}

  /// Errors: Cancelled once the Coordinator is closing.
  Result<LeasePtr> grant(milliseconds ttl, const Context& ctx);
  /// A lease of this TTL that was given back, or a new one.
  Result<LeasePtr> take(milliseconds ttl, const Context& ctx);
  /// A live lease without keys, for the next one who wants this TTL.
  void give_back(LeasePtr lease);
  /// Ends it in the background, unless it is lost or over already.
  void drop(const LeasePtr& lease);
  /// Ends a lease in the background: tried again until it is done or its TTL is over.
  /// `granted` false: the grant may still be under way.
  void revoke_later(std::int64_t id, milliseconds ttl, bool granted);
  /// Ends it now, or in the background where that fails.
  Result<void> end(const LeasePtr& lease, const Context& ctx);
  Result<void> renew_now(const LeasePtr& lease, const Context& ctx);
  /// Whether it is a live lease of this Coordinator's.
  bool keeps(std::int64_t id) {
    std::lock_guard<std::mutex> lock(mutex_);
    return leases_.count(id) > 0;
  }
  /// Renews it no more.
  void forget(std::int64_t id) {
    std::lock_guard<std::mutex> lock(mutex_);
    leases_.erase(id);
  }
  /// Something is wrong with the connection: renew everything now.
  void hurry();
  /// When the clock has jumped.
  void wake() {
    check_deadlines();
    auto now = steady_clock::now();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tick_at_ = now;
    }
    tick(now);
  }
  /// When all those are due that are to be renewed together, or one is over.
  SteadyTime next_due();
  /// Revokes everything until `limit`.
  void close(SteadyTime limit);

 private:
  static constexpr milliseconds kWindow{200};      // renewals that are due within it go together
  static constexpr milliseconds kRetry{500};       // after a renewal that failed
  static constexpr milliseconds kMostOpen{10000};  // that a request of renewals may take
  static constexpr milliseconds kRevokeRetry{500};
  static constexpr std::size_t kBatch = 1000;   // leases in one request
  static constexpr std::size_t kMostIdle = 64;  // leases kept for reuse

  struct Idle {
    LeasePtr lease;
    SteadyTime since;
  };
  struct Doomed {
    std::int64_t id;
    SteadyTime until;  // by then it has run out
    bool granted;
    SteadyTime next;
  };

  Result<LeasePtr> ask_for(milliseconds ttl, const Context& ctx);
  Result<LeasePtr> add(const LeasePtr& lease);
  Result<void> revoke(std::int64_t id, const Context& ctx);
  bool doom(std::int64_t id, milliseconds ttl, bool granted, SteadyTime next);
  void lost(const LeasePtr& lease, const char* why);
  void schedule(SteadyTime when);
  void tick(SteadyTime when);
  void renew(std::vector<LeasePtr> batch, SteadyTime asked);
  std::vector<LeasePtr> renew_once(ClientState& client, const std::vector<LeasePtr>& batch,
                                   ClientState::StreamPlace& place, bool* reached = nullptr);
  std::vector<LeasePtr> renew_singly(ClientState& client, const std::vector<LeasePtr>& batch,
                                     ClientState::StreamPlace& place);
  void answered(const LeasePtr& lease, SteadyTime sent, std::int64_t ttl);
  void check_deadlines(std::optional<SteadyTime> when = std::nullopt);
  void watch_deadline(SteadyTime deadline);
  void retire_idle();
  void sweep(SteadyTime when);
  void schedule_sweep(SteadyTime when);
  void revoke_all(const std::shared_ptr<std::vector<std::int64_t>>& ids, const Context& ctx);
  static milliseconds attempt_limit(const std::vector<LeasePtr>& batch);
  SteadyTime real_time(SteadyTime of_clock, const Clock& clock) const {
    return steady_clock::now() + (of_clock - clock.now());
  }

  std::weak_ptr<ClientState> client_;
  Gate grants_;
  int granting_{0};  // grants that are under way; the gate's mutex guards it
  std::mutex mutex_;
  std::unordered_map<std::int64_t, LeasePtr> leases_;
  std::vector<Idle> idle_;
  std::map<std::int64_t, Doomed> doomed_;
  std::optional<SteadyTime> tick_at_, check_at_, sweep_at_;
  bool closed_{false};
};

COORDINATION_API Result<void> validate_ttl(milliseconds ttl) {
  if (ttl.count() <= 0) return invalid("a TTL must be positive");
  if (ttl > std::chrono::hours(24 * 365 * 100)) return invalid("a TTL is over 100 years");
  return {};
}

COORDINATION_API Error lease_lost(const char* why) {
  return make_error(ErrorCode::Lost, "the lease is lost", why);
}

COORDINATION_API Result<LeasePtr> LeaseKeeper::grant(milliseconds ttl, const Context& ctx) {
  auto client = client_.lock();
  {
    std::lock_guard<std::mutex> lock(grants_.mutex);
    if (!client || client->closing) return closed_error();
    ++granting_;
  }
  auto lease = ask_for(ttl, client->bounded(ctx));
  std::lock_guard<std::mutex> lock(grants_.mutex);
  --granting_;
  grants_.changed.notify_all();
  return lease;
}

COORDINATION_API Result<LeasePtr> LeaseKeeper::ask_for(milliseconds ttl, const Context& ctx) {
  auto client = client_.lock();
  if (!client) return closed_error();
  // The client chooses the id: the same grant sent twice is one lease.
  auto id = static_cast<std::int64_t>(random_number() >> 2) + 1;
  auto strand = std::make_shared<Strand>(client->executor, client->executor->losses, client->log,
                                         "on_lost of the lease " + lease_hex(id));
  auto lease = std::make_shared<LeaseState>(id, client->clock, std::move(strand));
  lease->client = client;
  lease->asked = ttl;
  auto sent = client->clock->now();
  auto reply =
      client->ask<wire::LeaseReply>({"/v3/lease/grant", "the grant of a lease",
                                     wire::grant_body(id, seconds_up(ttl)), Safety::Idempotent},
                                    ctx);
  if (reply && reply->ttl > 0) {
    lease->renewed(sent, reply->ttl);
    bool slow = lease->deadline() - client->clock->now() < lease->ttl() / 2;
    auto renewed = slow ? renew_now(lease, ctx) : Result<void>();
    if (!renewed) return revoke_later(id, ttl, true), renewed.error();
    return add(lease);
  }
  if (reply) return not_etcd("etcd", "a grant without a TTL");
  if (reply.error().code == ErrorCode::Conflict) {  // "already exists": an earlier attempt did it
    auto renewed = renew_now(lease, ctx);
    if (!renewed) return revoke_later(id, ttl, true), renewed.error();
    return add(lease);
  }
  if (reply.error().outcome == Outcome::MaybeApplied) revoke_later(id, ttl, false);
  return reply.error();
}

COORDINATION_API Result<LeasePtr> LeaseKeeper::add(const LeasePtr& lease) {
  auto sent = lease->deadline() - lease->ttl();
  SteadyTime due;
  bool closed = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closed = closed_;
    due = lease->due = sent + jittered(lease->ttl() / 3);
    if (!closed) leases_[lease->id] = lease;
  }
  if (closed) {  // the grant was under way when everything was revoked
    lease->release();
    static_cast<void>(revoke(lease->id, Context::with_timeout(milliseconds(100))));
    return closed_error();
  }
  schedule(real_time(due, *lease->clock));
  watch_deadline(real_time(lease->deadline(), *lease->clock));
  return lease;
}

COORDINATION_API Result<LeasePtr> LeaseKeeper::take(milliseconds ttl, const Context& ctx) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    auto fits = [&](const Idle& idle) {
      auto& lease = *idle.lease;
      return lease.asked == ttl && lease.held() &&
             lease.deadline() - lease.clock->now() > lease.ttl() / 2;
    };
    auto it = std::find_if(idle_.begin(), idle_.end(), fits);
    if (it != idle_.end()) {
      auto lease = std::move(it->lease);
      idle_.erase(it);
      return lease;
    }
  }
  return grant(ttl, ctx);
}

COORDINATION_API void LeaseKeeper::give_back(LeasePtr lease) {
  lease->set_hook(nullptr);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!closed_ && !lease->tainted && lease->held() && idle_.size() < kMostIdle) {
      auto now = lease->clock->now();
      idle_.push_back({std::move(lease), now});
      return;
    }
  }
  drop(lease);
}

COORDINATION_API void LeaseKeeper::drop(const LeasePtr& lease) {
  if (!lease->release()) return;
  revoke_later(lease->id, lease->ttl(), true);  // first: close() must find it in one of the two
  forget(lease->id);
}

COORDINATION_API Result<void> LeaseKeeper::revoke(std::int64_t id, const Context& ctx) {
  auto client = client_.lock();
  if (!client) return closed_error();
  forget(id);
  auto done = client->ask<wire::Nothing>(
      {"/v3/lease/revoke", "the revoking of a lease", wire::lease_body(id), Safety::Idempotent},
      ctx);
  if (done || done.error().code == ErrorCode::NotFound) return {};
  return done.error();
}

/// close() must know of it while the request is under way.
COORDINATION_API Result<void> LeaseKeeper::end(const LeasePtr& lease, const Context& ctx) {
  lease->release();
  auto next = steady_clock::now() + kRevokeRetry;
  if (!doom(lease->id, lease->ttl(), true, next)) return closed_error();
  auto done = revoke(lease->id, ctx);
  if (!done) return schedule_sweep(next), done;
  std::lock_guard<std::mutex> lock(mutex_);
  doomed_.erase(lease->id);
  return {};
}

COORDINATION_API void LeaseKeeper::lost(const LeasePtr& lease, const char* why) {
  auto client = client_.lock();
  if (!client || !lease->lose(lease_lost(why))) return;
  (*client->log)(LogLevel::Warn, "a lease is lost",
                 {{"lease", lease_hex(lease->id)}, {"why", why}});
  // It may live on in etcd, where it would keep others out.
  revoke_later(lease->id, lease->ttl(), true);
  forget(lease->id);
}

// Renewing.

COORDINATION_API void LeaseKeeper::schedule(SteadyTime when) {
  auto client = client_.lock();
  if (!client) return;
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_ || (tick_at_ && *tick_at_ <= when)) return;
  tick_at_ = when;
  client->executor->timer.at(when, [weak = weak_from_this(), when] {
    if (auto self = weak.lock()) self->tick(when);
  });
}

/// `when` is the time that it was scheduled for: one that was overtaken by another does nothing.
/// What is asked for stays open however late it is; the next request begins beside it.
COORDINATION_API void LeaseKeeper::tick(SteadyTime when) {
  auto client = client_.lock();
  if (!client) return;
  auto now = client->clock->now();
  std::vector<LeasePtr> due;
  std::optional<SteadyTime> next;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (tick_at_ != when) return;
    tick_at_.reset();
    for (auto& entry : leases_) {
      auto& lease = entry.second;
      if (lease->due <= now + kWindow) {
        due.push_back(lease);
        lease->due = now + lease->ttl() / 3;
      }
      next = (std::min)(next.value_or(lease->due), lease->due);
    }
  }
  for (std::size_t i = 0; i < due.size(); i += kBatch) {
    auto begin = due.begin() + static_cast<std::ptrdiff_t>(i);
    auto size = static_cast<std::ptrdiff_t>((std::min)(kBatch, due.size() - i));
    client->executor->run(
        client->executor->renewals,
        [weak = weak_from_this(), now, batch = std::vector<LeasePtr>(begin, begin + size)] {
          if (auto self = weak.lock()) self->renew(batch, now);
        });
  }
  retire_idle();
  if (next) schedule((std::max)(real_time(*next, *client->clock), steady_clock::now() + kWindow));
}

/// The time after which an answer is of no use to any of them.
COORDINATION_API milliseconds LeaseKeeper::attempt_limit(const std::vector<LeasePtr>& batch) {
  milliseconds limit(250);
  for (auto& lease : batch) limit = (std::max)(limit, lease->ttl() * 2 / 3);
  return (std::min)(limit, kMostOpen);
}

/// Renews until each lease has an answer, once with every member at the most, and once more with a
/// token where that was wanted.
COORDINATION_API void LeaseKeeper::renew(std::vector<LeasePtr> batch, SteadyTime asked) {
  auto client = client_.lock();
  if (!client) return;
  auto is_renewed = [&](const LeasePtr& lease) { return lease->deadline() - lease->ttl() > asked; };
  batch.erase(std::remove_if(batch.begin(), batch.end(), is_renewed), batch.end());
  ClientState::StreamPlace place;
  for (std::size_t k = 0; k <= client->members->size() && !batch.empty(); ++k) {
    if (client->open.cancelled() || (k == client->members->size() && !place.needs_token)) break;
    place.bare = !place.needs_token;
    batch = renew_once(*client, batch, place);
  }
  if (batch.size() > 1) batch = renew_singly(*client, batch, place);
  if (batch.empty()) return;
  auto now = client->clock->now();
  auto soon = (SteadyTime::max)();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& lease : batch) {
      lease->due = (std::min)(lease->due, now + (std::min)(kRetry, lease->ttl() / 10));
      soon = (std::min)(soon, lease->due);
    }
  }
  schedule(real_time(soon, *client->clock));
}

/// One that is refused keeps back the rest of a batch, and a batch needs a new connection, which
/// may not be had. Returns those that are left when the time of one attempt is over.
COORDINATION_API std::vector<LeasePtr> LeaseKeeper::renew_singly(ClientState& client,
                                                                 const std::vector<LeasePtr>& batch,
                                                                 ClientState::StreamPlace& place) {
  std::vector<std::pair<SteadyTime, LeasePtr>> urgent;
  urgent.reserve(batch.size());
  for (auto& lease : batch) urgent.emplace_back(lease->deadline(), lease);
  std::sort(urgent.begin(), urgent.end());
  const auto end = steady_clock::now() + attempt_limit(batch);
  std::vector<LeasePtr> left;
  bool reached = true;
  for (auto& [deadline, lease] : urgent) {
    bool go_on = reached && !client.open.cancelled() && steady_clock::now() < end;
    if (!go_on || !renew_once(client, {lease}, place, &reached).empty()) left.push_back(lease);
  }
  return left;
}

/// One request for all; returns those that have got no answer.
COORDINATION_API std::vector<LeasePtr> LeaseKeeper::renew_once(ClientState& client,
                                                               const std::vector<LeasePtr>& batch,
                                                               ClientState::StreamPlace& place,
                                                               bool* reached) {
  std::unordered_map<std::int64_t, LeasePtr> waiting;
  std::string body;
  for (auto& lease : batch) {
    body += wire::lease_body(lease->id) + "\n";
    waiting.emplace(lease->id, lease);
  }
  auto sent = client.clock->now();
  wire::Lines lines;
  place.must_answer = true;
  place.refused = false;
  Error refusal = make_error(ErrorCode::Unavailable, "no answer for some");
  auto line = [&](std::string_view text) {
    auto reply = client.read_line<wire::LeaseReply>(place, text);
    if (!reply) return refusal = reply.error(), false;
    auto it = waiting.find(reply->id);
    if (it == waiting.end()) return true;
    answered(it->second, sent, reply->ttl);
    waiting.erase(it);
    return true;
  };
  auto sink = [&](std::string_view piece) { return lines.feed(piece, line); };
  auto limit = Context::with_timeout(attempt_limit(batch));
  auto end =
      client.stream("/v3/lease/keepalive", std::move(body), sink, limit, &place, batch.size() > 1);
  lines.finish(line);
  if (reached) *reached = end || !is_out_of_reach(end.error());
  std::vector<LeasePtr> left;
  left.reserve(waiting.size());
  for (auto& entry : waiting) left.push_back(entry.second);
  if (left.empty() || client.open.cancelled()) return left;
  (*client.log)(
      LogLevel::Warn, "leases were not renewed",
      {{"count", std::to_string(left.size())}, {"cause", to_string(end ? refusal : end.error())}});
  return left;
}

COORDINATION_API void LeaseKeeper::answered(const LeasePtr& lease, SteadyTime sent,
                                            std::int64_t ttl) {
  if (ttl <= 0) return lost(lease, "etcd does not know it any more");
  lease->renewed(sent, ttl);
  std::lock_guard<std::mutex> lock(mutex_);
  lease->due = sent + jittered(lease->ttl() / 3);
}

COORDINATION_API Result<void> LeaseKeeper::renew_now(const LeasePtr& lease, const Context& ctx) {
  auto client = client_.lock();
  if (!client) return closed_error();
  auto sent = client->clock->now();
  std::variant<std::monostate, wire::LeaseReply, wire::EtcdError> line;
  auto is_line = [&](const std::string& answer) {
    line = wire::decode_line<wire::LeaseReply>(answer);
    auto* reply = std::get_if<wire::LeaseReply>(&line);
    return line.index() == 0 ? std::nullopt : std::make_optional(reply ? reply->cluster : 0);
  };
  auto reply = client->call({"/v3/lease/keepalive", "the renewal of a lease",
                             wire::lease_body(lease->id), Safety::Idempotent},
                            ctx, is_line);
  if (!reply) return reply.error();
  auto* answer = std::get_if<wire::LeaseReply>(&line);
  if (auto* error = std::get_if<wire::EtcdError>(&line)) {
    return judge_error(*error, client->members->url(reply->member)).error;
  }
  if (answer->id != lease->id) return not_etcd(client->members->url(reply->member), reply->body);
  answered(lease, sent, answer->ttl);
  if (answer->ttl <= 0) return lease_lost("etcd does not know it any more");
  return {};
}

COORDINATION_API void LeaseKeeper::hurry() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& entry : leases_) entry.second->due = {};
  }
  schedule(steady_clock::now());
}

// Losing.

COORDINATION_API void LeaseKeeper::watch_deadline(SteadyTime deadline) {
  auto client = client_.lock();
  if (!client) return;
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_ || (check_at_ && *check_at_ <= deadline)) return;
  check_at_ = deadline;
  client->executor->timer.at(deadline, [weak = weak_from_this(), deadline] {
    if (auto self = weak.lock()) self->check_deadlines(deadline);
  });
}

COORDINATION_API SteadyTime LeaseKeeper::next_due() {
  auto next = (SteadyTime::max)();
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& entry : leases_) {
    auto& lease = *entry.second;
    auto renewal = (std::max)(lease.due, lease.deadline() - lease.ttl() * 2 / 3);
    next = (std::min)({next, renewal, lease.deadline()});
  }
  return next;
}

COORDINATION_API void LeaseKeeper::check_deadlines(std::optional<SteadyTime> when) {
  auto client = client_.lock();
  if (!client) return;
  auto now = client->clock->now();
  std::vector<LeasePtr> over;
  std::optional<SteadyTime> next;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (when && check_at_ != when) return;
    check_at_.reset();
    for (auto& entry : leases_) {
      auto deadline = entry.second->deadline();
      if (deadline <= now) {
        over.push_back(entry.second);
      } else {
        next = (std::min)(next.value_or(deadline), deadline);
      }
    }
  }
  for (auto& lease : over) lost(lease, "it was not renewed within its TTL");
  if (next) watch_deadline(real_time(*next, *client->clock) + milliseconds(1));
}

// Ending.

/// A lease that nobody has taken for as long as its TTL is not needed.
COORDINATION_API void LeaseKeeper::retire_idle() {
  std::vector<LeasePtr> old;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    auto is_old = [&](const Idle& idle) {
      auto keep = (std::max)(idle.lease->ttl(), milliseconds(10000));
      return !idle.lease->held() || idle.lease->clock->now() - idle.since > keep;
    };
    for (auto& idle : idle_) {
      if (is_old(idle)) old.push_back(idle.lease);
    }
    idle_.erase(std::remove_if(idle_.begin(), idle_.end(), is_old), idle_.end());
  }
  for (auto& lease : old) drop(lease);
}

COORDINATION_API void LeaseKeeper::revoke_later(std::int64_t id, milliseconds ttl, bool granted) {
  auto now = steady_clock::now();
  if (doom(id, ttl, granted, now)) schedule_sweep(now);
}

COORDINATION_API bool LeaseKeeper::doom(std::int64_t id, milliseconds ttl, bool granted,
                                        SteadyTime next) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return false;
  auto lives = std::clamp(ttl, milliseconds(2000), kLongest) + milliseconds(1000);
  doomed_[id] = {id, steady_clock::now() + lives, granted, next};
  return true;
}

COORDINATION_API void LeaseKeeper::schedule_sweep(SteadyTime when) {
  auto client = client_.lock();
  if (!client) return;
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_ || (sweep_at_ && *sweep_at_ <= when)) return;
  sweep_at_ = when;
  client->executor->run_at(when, client->executor->asides, [weak = weak_from_this(), when] {
    if (auto self = weak.lock()) self->sweep(when);
  });
}

/// Tries once for every doomed lease whose time has come; stops at the first that cannot be
/// reached.
COORDINATION_API void LeaseKeeper::sweep(SteadyTime when) {
  std::vector<Doomed> due;
  auto now = steady_clock::now();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (sweep_at_ != when) return;
    sweep_at_.reset();
    for (auto& entry : doomed_) {
      if (entry.second.next > now) continue;
      entry.second.next = now + kRevokeRetry;  // they stay in the list, for close()
      due.push_back(entry.second);
    }
  }
  bool reachable = true;
  for (auto& doomed : due) {
    auto enough = Context::with_timeout(milliseconds(5000));
    auto done = reachable ? revoke(doomed.id, enough) : Result<void>(closed_error());
    reachable = reachable && (done || !is_out_of_reach(done.error()));
    // Where etcd cannot be reached, a grant may still wait to be done.
    auto ended = steady_clock::now();
    bool over = (done && doomed.granted) || ended >= doomed.until;
    std::lock_guard<std::mutex> lock(mutex_);
    auto it = doomed_.find(doomed.id);
    if (it == doomed_.end()) continue;
    it->second.next = ended + kRevokeRetry;
    if (over) doomed_.erase(it);
  }
  std::optional<SteadyTime> next;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& entry : doomed_) {
      next = (std::min)(next.value_or(entry.second.next), entry.second.next);
    }
  }
  if (next) schedule_sweep(*next);
}

COORDINATION_API void LeaseKeeper::close(SteadyTime limit) {
  auto client = client_.lock();
  if (!client) return;
  auto ids = std::make_shared<std::vector<std::int64_t>>();
  std::vector<LeasePtr> leases;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return;
    closed_ = true;
    for (auto& entry : leases_) leases.push_back(entry.second);
    for (auto& entry : doomed_) ids->push_back(entry.first);
    idle_.clear();
    leases_.clear();
  }
  for (auto& lease : leases) {
    lease->release();
    ids->push_back(lease->id);
  }
  auto ctx = Context::with_deadline(limit);
  revoke_all(ids, ctx);
  // Grants that are under way bring leases that are revoked when they come; new ones are refused.
  grants_.wait(ctx, [this] { return granting_ == 0; });
}

/// Over the stream threads, which have nothing else to do any more; a second is soon over.
COORDINATION_API void LeaseKeeper::revoke_all(const std::shared_ptr<std::vector<std::int64_t>>& ids,
                                              const Context& ctx) {
  auto client = client_.lock();
  if (!client || ids->empty()) return;
  auto next = std::make_shared<std::atomic<std::size_t>>(0);
  auto gate = std::make_shared<Gate>();
  auto running = std::make_shared<int>(static_cast<int>(kMaxStreams) - 1);
  auto work = [self = shared_from_this(), ids, next, gate, running, ctx] {
    for (auto i = (*next)++; i < ids->size() && !ctx.done(); i = (*next)++) {
      auto done = self->revoke((*ids)[i], ctx);
      if (!done && is_out_of_reach(done.error())) break;
    }
    std::lock_guard<std::mutex> lock(gate->mutex);
    --*running;
    gate->changed.notify_all();
  };
  for (std::size_t i = 1; i < kMaxStreams; ++i) client->executor->streams->post(work);
  gate->wait(ctx, [&] { return *running == 0; });
}

}  // namespace detail

COORDINATION_API Result<Lease> Client::grant(milliseconds ttl, Context ctx) {
  auto valid = detail::validate_ttl(ttl);
  if (!valid) return valid.error();
  auto lease = state_->leases->grant(ttl, state_->bounded(ctx));
  if (!lease) return lease.error();
  return Lease(std::move(*lease));
}

COORDINATION_API void detail::let_go(const std::shared_ptr<LeaseState>& lease) {
  lease->loss.close();
  lease->client->leases->drop(lease);
}

COORDINATION_API std::int64_t Lease::id() const { return state_->id; }
COORDINATION_API milliseconds Lease::ttl() const { return state_->ttl(); }
COORDINATION_API bool Lease::held() const { return state_->held(); }

COORDINATION_API void Lease::on_lost(std::function<void(const Error&)> handler) {
  state_->loss.add(std::move(handler));
}

namespace detail {
/// What is left of a lease, as etcd says.
COORDINATION_API Result<milliseconds> remaining(LeaseState& lease, const Context& ctx) {
  auto reply =
      lease.client->ask<wire::LeaseReply>({"/v3/lease/timetolive", "the question for a lease",
                                           wire::lease_body(lease.id), Safety::Read},
                                          ctx);
  if (!reply) return reply.error();
  if (reply->ttl < 0) return lease_lost("etcd does not know it any more");
  return milliseconds(std::chrono::seconds(reply->ttl));
}
}  // namespace detail

COORDINATION_API Result<milliseconds> Lease::remaining(Context ctx) {
  return detail::remaining(*state_, ctx);
}

COORDINATION_API Result<void> Lease::keep_alive_once(Context ctx) {
  if (state_->client->closing) return detail::closed_error();
  if (!state_->held()) return detail::lease_lost("it has ended");
  return state_->client->leases->renew_now(state_, ctx);
}

COORDINATION_API Result<void> Lease::revoke(Context ctx) {
  state_->loss.shut();
  return state_->client->leases->end(state_, ctx);
}

COORDINATION_API std::int64_t Lease::detach() {
  state_->loss.shut();
  state_->client->leases->forget(state_->id);
  state_->release();
  return state_->id;
}

// == 7. Watch ===================================================================================

namespace detail {

/// Where the events of one watch go. Called from stream threads, one at a time; must not block.
class HubSink {
 public:
  virtual ~HubSink() = default;
  /// All events of one revision. False: after this line it wants no more until resume().
  virtual bool deliver(std::vector<WatchEvent> events) = 0;
  /// Whether it wants more by now.
  virtual bool ready() { return true; }
  /// Nothing is missing up to `revision`.
  virtual void progress(std::int64_t revision) { static_cast<void>(revision); }
  /// The watch is over: what came before `revision` is gone; or the store is another one, whose
  /// revisions mean something else.
  virtual void cut_off(std::int64_t revision, bool another) = 0;
  /// Whether cut_off() makes it read again and go on, so that it may be told in doubt, too.
  virtual bool reads_again() const { return false; }
  /// The watch is over. Who has a lease, too, is told by that.
  virtual void failed(const Error& error) { static_cast<void>(error); }
};

COORDINATION_API RangeRequest range_of(const WatchRequest& watch) {
  return {watch.key, watch.range_end};
}

/// One watch, wherever it may stand.
struct HubWatch {
  enum class State { Waiting, Open, Parked, Over };

  std::int64_t id{0};
  WatchRequest request;
  std::weak_ptr<HubSink> sink;
  std::mutex delivering;
  std::atomic<std::int64_t> next_revision{0};
  std::atomic<bool> anchored{false};  // next_revision is what etcd has said, not a wish
  // The hub's mutex guards these:
  State state{State::Waiting};
  int streams{0};              // that carry it
  bool confirmed{false};       // etcd has created it, once at least
  bool stays{false};           // etcd has refused to create it again
  int refusals{0};             // in a row
  std::uint64_t born{0};       // after so many breaks
  std::int64_t born_below{0};  // it began before what others had seen: in a new history?
  SteadyTime heard{};          // when a stream that it has left was last heard of
};

using HubWatchPtr = std::shared_ptr<HubWatch>;

/// One POST to /v3/watch that carries many watches.
struct HubStream {
  explicit HubStream(std::shared_ptr<Clock> c) : clock(std::move(c)) {}

  const std::shared_ptr<Clock> clock;
  Context ctx;
  ClientState::StreamPlace place;
  std::string body;  // of the POST
  std::unordered_map<std::int64_t, HubWatchPtr> watches;
  std::deque<HubWatchPtr> unconfirmed;  // etcd confirms, and refuses, in the order of asking
  std::vector<std::shared_ptr<HubStream>> victims;  // that it swallows when it stands
  bool swallowed{false};                            // it is one of them
  bool answered{false}, open{false};                // the first, all are confirmed
  std::atomic<bool> returns{false};  // it began with watches that no other stream carried
  Past past;                         // of when it began
  std::size_t dead{0};               // watches that have left, and that etcd goes on to serve
  int looks{0};                      // see is_there
  std::atomic<bool> over{false}, suspect{false};
  wire::Fragments fragments;  // its own thread's
  const SteadyTime begun{clock->now()};
  std::atomic<SteadyTime> heard{begun};
  SteadyTime opened{};

  void hear() {
    heard = clock->now();
    suspect = false;
  }
  milliseconds silence() const {
    return std::chrono::duration_cast<milliseconds>(clock->now() - heard.load());
  }
  /// When etcd was last heard of here.
  SteadyTime last_heard() const { return answered ? heard.load() : SteadyTime{}; }
};

using HubStreamPtr = std::shared_ptr<HubStream>;

/// When a stream is opened, and which others it swallows. Sees numbers only.
///
/// The JSON gateway reads a request only before it answers, so a stream can gain no watch later.
/// New watches go into a new stream, together with those of all streams that are not much larger,
/// as in a binary counter: sizes grow by a factor from stream to stream, there are at most
/// kMaxStreams - 1 of them, and each watch is created again O(log N) times. A stream whose dead
/// are as many as its living is swallowed, too.
class StreamPolicy {
 public:
  enum class Kind {
    Movable,
    Busy,  // being confirmed, or being swallowed
    Stuck  // etcd would not create all its watches again: they stay, and it keeps no other out
  };
  struct Stream {
    std::size_t living{0}, dead{0};
    Kind kind{Kind::Movable};
  };
  using Victims = std::vector<std::size_t>;

  /// The victims of the next stream, if there is to be one, beside those that are ending.
  static std::optional<Victims> next(const std::vector<Stream>& streams, std::size_t waiting,
                                     std::size_t ending) {
    std::size_t stuck = 0, busy = ending, total = waiting, size = waiting;
    Victims victims, candidates;
    for (std::size_t i = 0; i < streams.size(); ++i) {
      auto& stream = streams[i];
      total += stream.living;
      if (stream.kind == Kind::Stuck) ++stuck;
      if (stream.kind == Kind::Busy) ++busy;
      if (stream.kind != Kind::Movable) continue;
      bool wasteful = stream.dead > 0 && stream.dead >= stream.living;
      (wasteful ? victims : candidates).push_back(i);
      if (wasteful) size += stream.living;
    }
    auto steady = (std::max)(kMaxStreams - 1, stuck + 1);
    auto fits = [&] { return streams.size() - victims.size() + 1 <= steady; };
    // One may be above, while others are merged into it; where none is under way, always one more.
    auto most = busy > 0 ? (std::min)(steady + 1, kUtmostStreams) : kUtmostStreams;
    if (streams.size() + ending >= most) return std::nullopt;
    if (waiting == 0) candidates.clear();
    std::sort(candidates.begin(), candidates.end(),
              [&](auto a, auto b) { return streams[a].living < streams[b].living; });
    // The factor grows where so many batches would need more streams than are allowed.
    auto batches = static_cast<double>(total) / static_cast<double>(waiting + 1);
    double factor = (std::max)(1.0, std::pow(batches, 1 / static_cast<double>(kMaxStreams - 1)));
    for (auto i : candidates) {
      auto living = streams[i].living;
      if (fits() && static_cast<double>(living) > factor * static_cast<double>(size)) break;
      size += living;
      victims.push_back(i);
    }
    if (size == 0 || !fits()) return std::nullopt;
    return victims;
  }

  /// Some at once; then, the more watches there are, the more a merge costs, and the longer new
  /// ones are gathered, unless they have become many, or no more come.
  SteadyTime next_opening(SteadyTime now, std::size_t watches, std::size_t waiting) const {
    if (opened_.size() < kBurst) return now;
    auto gather = milliseconds((std::min)(static_cast<std::int64_t>(watches / 4), kMostGather));
    bool are_many = waiting * 2 >= watches;
    if (are_many) return (std::max)(now, opened_.back() + kPace / 4);
    auto gathered = (std::min)(opened_.front() + kPace + gather, asked_ + kQuiet);
    return (std::max)({now, opened_.front() + kPace, gathered});
  }
  void asked(SteadyTime now) { asked_ = now; }
  void opened(SteadyTime now) {
    opened_.push_back(now);
    if (opened_.size() > kBurst) opened_.pop_front();
  }

 private:
  static constexpr std::size_t kBurst = 4;   // new streams at once, and then so many
  static constexpr milliseconds kPace{200};  //   in this time
  static constexpr milliseconds kQuiet{100};
  static constexpr std::int64_t kMostGather{1000};

  std::deque<SteadyTime> opened_;  // when the last kBurst streams were
  SteadyTime asked_{};             // when a new watch came
};

/// All watches of a Coordinator on a few streams.
///
/// A stream that is swallowed by another ends when that one has confirmed all its watches, and
/// etcd still has what they need; in between both may deliver, and each watch takes what continues
/// it. Where one of them cannot move the stream stays as it is. So nothing but etcd, or its owner,
/// ends a watch.
class WatchHub : public std::enable_shared_from_this<WatchHub> {
 public:
  explicit WatchHub(const std::shared_ptr<ClientState>& client)
      : client_(client), executor_(client->executor) {}

  std::int64_t add(WatchRequest request, std::int64_t next_revision, bool anchored,
                   std::weak_ptr<HubSink> sink) {
    auto watch = std::make_shared<HubWatch>();
    watch->request = std::move(request);
    watch->sink = std::move(sink);
    watch->next_revision = next_revision;
    watch->anchored = anchored;
    if (anchored && next_revision <= witness_.seen()) watch->born_below = witness_.seen();
    if (anchored) witness_.see(next_revision - 1);
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return 0;
    watch->id = ++last_id_;
    watch->born = breaks_;
    watches_.emplace(watch->id, watch);
    policy_.asked(steady_clock::now());
    wait_again(watch);
    schedule();
    return watch->id;
  }

  /// A moment for new watches to stand: events that come before they do are served by etcd's timer
  /// of 100 ms. Not where many are being made.
  void settle_few() {
    std::unique_lock<std::mutex> lock(mutex_);
    auto now = steady_clock::now();
    bool few = watches_.size() <= kFew && next_opening(now) <= now;
    if (few) settled_.wait_for(lock, milliseconds(50), [this] { return is_settled(); });
  }
  /// Before the clock is moved; for what does not end, once.
  void settle() {
    std::unique_lock<std::mutex> lock(mutex_);
    auto limit = stuck_ ? milliseconds(0) : kPatience;
    stuck_ = !settled_.wait_for(lock, limit, [this] { return is_settled(); });
  }

  void remove(std::int64_t id) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto it = watches_.find(id);
    if (it != watches_.end()) leave(it->second, State::Over);
  }

  /// A parked watch goes on.
  void resume(std::int64_t id) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto it = watches_.find(id);
    if (it == watches_.end() || it->second->state != State::Parked) return;
    wait_again(it->second);
    schedule();
  }

  bool connected(std::int64_t id) {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::any_of(streams_.begin(), streams_.end(), [&](const HubStreamPtr& stream) {
      return stream->open && !stream->suspect && stream->watches.count(id) > 0;
    });
  }

  /// When etcd was last heard of on a stream that carried this watch.
  SteadyTime last_heard(std::int64_t id) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto it = watches_.find(id);
    if (it == watches_.end()) return {};
    auto last = it->second->heard;
    for (auto& stream : streams_) {
      if (stream->watches.count(id) > 0) last = (std::max)(last, stream->last_heard());
    }
    return last;
  }

  /// By what is in the store it is known again.
  void remember(const KeyValue& kv) { witness_.remember(kv); }

  /// False: it has no streams.
  bool hear_of(std::size_t member, Sign sign) {
    bool any = false;
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& stream : streams_) {
      if (stream->place.member != member) continue;
      any = true;
      if (sign == Sign::Serves) stream->hear();
      if (sign == Sign::Doubt) stream->suspect = true;
      bool silent = stream->suspect || stream->silence() >= kSilence;
      if (sign == Sign::Silence && silent) cancel(*stream);
    }
    return any;
  }
  /// A stream may be silent because nothing happens, or because its member is frozen or cut off:
  /// the member is asked. Says when to look again. Also for when the clock has jumped.
  milliseconds look_after_streams() {
    auto next = kSilence;
    auto client = client_.lock();
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& stream : streams_) {
      auto silence = stream->silence();
      bool silent = silence >= kSilence;
      if (silent && client) client->look(stream->place.member, kPatience);
      if (!silent) next = (std::min)(next, kSilence - silence);
    }
    return (std::max)(next, milliseconds(100));
  }

  void close() {
    std::map<std::int64_t, HubWatchPtr> watches;
    std::vector<HubStreamPtr> streams;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
      watches.swap(watches_);
      streams = streams_;
      for (auto& entry : watches) entry.second->state = State::Over;
      for (auto& stream : streams) detach(stream);
      waiting_.clear();
      settled_.notify_all();
    }
    for (auto& stream : streams) stream->ctx.cancel();
    for (auto& entry : watches) {
      if (auto sink = entry.second->sink.lock()) sink->failed(closed_error());
    }
  }

 private:
  using State = HubWatch::State;
  static constexpr milliseconds kLinger{150};  // etcd serves a watch that is behind every 100 ms
  static constexpr milliseconds kLookAgain{300};
  static constexpr int kMostLooks = 7;
  static constexpr milliseconds kStands{1000};         // a stream that lives so long has stood
  static constexpr milliseconds kSilence{2500};        // then its member is asked,
  static constexpr milliseconds kPatience{2000};       //   and has so long to answer
  static constexpr milliseconds kBetween{1000};        // two confirmations of a stream
  static constexpr milliseconds kConfirmation{10000};  // the first one
  static constexpr std::size_t kFew = 100;             // watches that etcd creates in no time
  static constexpr int kMostRefusals = 6;

  /// Does `task` on a stream thread, where it may block.
  template <class Task, class Arg>
  void later(steady_clock::duration delay, Task task, Arg arg) {
    auto on_thread = [weak = weak_from_this(), task, arg] {
      auto self = weak.lock();
      auto client = self ? self->client_.lock() : nullptr;
      if (client) ((*self).*task)(*client, arg);
    };
    executor_->run_at(steady_clock::now() + delay, executor_->streams, on_thread);
  }

  void supervise(milliseconds delay) {
    executor_->timer.after(delay, [weak = weak_from_this()] {
      if (auto self = weak.lock()) self->supervise(self->look_after_streams());
    });
  }

  // Opening streams. Under the mutex, but for open_next() and run().

  bool is_settled() const {
    bool opens = open_at_ && *open_at_ <= steady_clock::now();
    auto stands = [](const HubStreamPtr& stream) { return stream->open; };
    return closed_ || (!opens && std::all_of(streams_.begin(), streams_.end(), stands));
  }

  SteadyTime next_opening(SteadyTime now) const {
    return policy_.next_opening(now, watches_.size(), waiting_.size());
  }

  void schedule() { schedule(next_opening(steady_clock::now())); }
  void schedule(SteadyTime when) {
    if (closed_ || (open_at_ && *open_at_ <= when)) return;
    open_at_ = when;
    later(when - steady_clock::now(), &WatchHub::open_next, when);
  }

  void open_next(ClientState& client, SteadyTime when) {
    HubStreamPtr stream;
    auto now = steady_clock::now();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (closed_ || open_at_ != when) return;
      open_at_.reset();
      settled_.notify_all();
      if (next_opening(now) > now) return schedule();  // more have come
      std::vector<StreamPolicy::Stream> all;
      for (auto& other : streams_) all.push_back(numbers(*other));
      auto victims = StreamPolicy::next(all, waiting_.size(), ending_);
      if (!victims) return;  // comes again when a stream has ended
      stream = make_stream(*victims, client.clock);
      policy_.opened(now);
      if (!std::exchange(supervised_, true)) supervise(kSilence);
    }
    later(kBetween, &WatchHub::check_confirmations, stream);
    run(client, stream);
  }

  bool can_move(const HubWatch& watch) const {
    return !watch.stays && watch.next_revision >= compacted_;
  }

  StreamPolicy::Stream numbers(const HubStream& stream) const {
    using Kind = StreamPolicy::Kind;
    auto moves = [this](const auto& entry) { return can_move(*entry.second); };
    bool all_move = std::all_of(stream.watches.begin(), stream.watches.end(), moves);
    bool busy = !stream.open || stream.swallowed;
    auto kind = busy ? Kind::Busy : all_move ? Kind::Movable : Kind::Stuck;
    return {stream.watches.size(), stream.dead, kind};
  }

  /// etcd 3.4 discards a delete at the very revision of a compaction, and lets a watch begin there
  /// all the same. Who comes back asks for one revision more than it needs, to be told.
  HubStreamPtr make_stream(const StreamPolicy::Victims& victims, std::shared_ptr<Clock> clock) {
    auto stream = std::make_shared<HubStream>(std::move(clock));
    auto join = [&](const HubWatchPtr& watch) {
      if (!stream->watches.emplace(watch->id, watch).second) return;
      stream->unconfirmed.push_back(watch);
      bool returns = watch->streams++ == 0 && watch->confirmed;
      stream->returns = stream->returns || returns;
      watch->state = State::Open;
      auto start = watch->next_revision.load();
      if (returns && watch->anchored && start > 1) --start;
      stream->body += wire::watch_body(watch->request, watch->id, start) + "\n";
    };
    for (auto& watch : std::exchange(waiting_, {})) join(watch);
    for (auto i : victims) {
      streams_[i]->swallowed = true;
      for (auto& entry : streams_[i]->watches) join(entry.second);
      stream->victims.push_back(streams_[i]);
    }
    stream->past = witness_.past(range_of(stream->watches.begin()->second->request));
    streams_.push_back(stream);
    return stream;
  }

  void run(ClientState& client, const HubStreamPtr& stream) {
    auto end = make_error(ErrorCode::Unavailable, "the stream has ended");
    wire::Lines lines;
    auto line = [&](std::string_view text) { return on_line(client, stream, text, end); };
    auto sink = [&](std::string_view piece) {
      stream->hear();
      return lines.feed(piece, line);
    };
    auto done =
        client.stream("/v3/watch", std::move(stream->body), sink, stream->ctx, &stream->place);
    if (!done) end = done.error();
    lines.finish(line);
    bool in_vain = done && !stream->open && !stream->ctx.cancelled() && !stream->place.refused;
    if (in_vain) client.member_failed(stream->place.member, end);
    on_end(client, stream, end);
  }

  /// What a stream should have answered long ago may be held back by something in between; or it
  /// has not passed all of the request on to etcd, or etcd has thrown a part of it away.
  void check_confirmations(ClientState& client, const HubStreamPtr& stream) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (stream->over || stream->open) return;
      bool stopped = stream->answered && stream->silence() >= kBetween;
      if (!stopped && stream->clock->now() - stream->begun <= kConfirmation) {
        return later(kLookAgain, &WatchHub::check_confirmations, stream);
      }
      for (auto& watch : std::exchange(stream->unconfirmed, {})) leave_stream(stream, watch, true);
      schedule(steady_clock::now() + backoff_.next());
    }
    if (stream->answered) client.pads_bodies = true;
    if (stream->answered) return on_confirmed(stream);
    auto error = make_error(ErrorCode::Unavailable, "it does not confirm watches");
    client.member_failed(stream->place.member, error);
  }

  // Reading streams.

  /// False: the stream is of no more use.
  bool on_line(ClientState& client, const HubStreamPtr& stream, std::string_view text, Error& end) {
    auto line = client.read_line<wire::WatchLine>(stream->place, text);
    if (!line) return end = line.error(), false;
    if (line->created) {
      on_created(client, stream, *line);
    } else if (line->canceled) {
      on_canceled(client, stream, *line);
    } else {
      on_events(stream, *line);
    }
    witness_.see(line->revision);
    return true;
  }

  void on_created(ClientState& client, const HubStreamPtr& stream, const wire::WatchLine& line) {
    HubWatchPtr watch;
    bool all = false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (stream->unconfirmed.empty()) return;
      watch = std::move(stream->unconfirmed.front());
      stream->unconfirmed.pop_front();
      all = stream->unconfirmed.empty();
      stream->answered = true;
      if (line.revision >= watch->born_below) watch->born_below = 0;
      if (!line.canceled) {
        watch->confirmed = true;
        watch->stays = false;
        watch->refusals = 0;
      }
    }
    if (line.canceled) refused(client, stream, watch, line.cancel_reason);
    if (all) on_confirmed(stream);
  }

  /// A watch that another stream carries stays there.
  void refused(ClientState& client, const HubStreamPtr& stream, const HubWatchPtr& watch,
               const std::string& reason) {
    auto verdict = judge_error({3, reason}, client.members->url(stream->place.member));
    bool logs_in = !client.options.username.empty();
    bool denied = verdict.error.code == ErrorCode::PermissionDenied;
    if (denied && logs_in) client.token_died(stream->place.token);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (watch->state == State::Over) return;
      leave_stream(stream, watch, false);
      bool again = tries_again(*watch, verdict, logs_in);
      watch->stays = watch->streams > 0 && !again;
      if (watch->streams > 0) return;
      if (again && !open_at_) schedule(steady_clock::now() + backoff_.next());
      if (again) return;
    }
    bool gone = verdict.error.code == ErrorCode::Compacted;
    end_watch(watch,
              [&](HubSink& sink) { gone ? sink.cut_off(0, false) : sink.failed(verdict.error); });
  }

  /// What was allowed before, and is not any more, may be the token's fault: some fresh ones must
  /// be refused as well.
  static bool tries_again(HubWatch& watch, const Verdict& verdict, bool may_log_in) {
    using Next = Verdict::Next;
    if (verdict.next == Next::OtherMember || verdict.next == Next::Wait) return true;
    if (verdict.error.code != ErrorCode::PermissionDenied || !may_log_in) return false;
    bool in_doubt = verdict.next == Next::Login || watch.confirmed;
    return ++watch.refusals < kMostRefusals && in_doubt;
  }

  void on_confirmed(const HubStreamPtr& stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stream->over || std::exchange(stream->open, true)) return;
    stream->opened = steady_clock::now();
    settled_.notify_all();
    if (!waiting_.empty()) schedule();
    take_over_soon(stream);
  }

  void on_canceled(ClientState& client, const HubStreamPtr& stream, const wire::WatchLine& line) {
    auto watch = find(stream, line.id);
    if (!watch) return;
    if (line.compact_revision == 0) return refused(client, stream, watch, line.cancel_reason);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      compacted_ = (std::max)(compacted_, line.compact_revision);
      leave_stream(stream, watch, false);
      if (watch->streams > 0) return;  // there it misses nothing
      if (watch->next_revision > line.compact_revision) return schedule();  // nor does it by now
    }
    end_watch(watch, [&](HubSink& sink) { sink.cut_off(line.compact_revision, false); });
  }

  void on_events(const HubStreamPtr& stream, wire::WatchLine& line) {
    auto watch = find(stream, line.id);
    if (!watch) return stream->fragments.forget(line.id);  // it has left
    auto sink = watch->sink.lock();
    if (!sink) return;
    if (pass_on(*watch, *sink, line, stream->fragments)) return;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (watch->state != State::Open && watch->state != State::Waiting) return;
      leave(watch, State::Parked);
    }
    if (sink->ready()) resume(watch->id);  // it was emptied in between
  }

  /// Gives the sink what it has not had yet, revision by revision; false when it wants no more.
  bool pass_on(HubWatch& watch, HubSink& sink, wire::WatchLine& line, wire::Fragments& fragments) {
    std::lock_guard<std::mutex> lock(watch.delivering);
    if (line.events.empty() && line.revision >= watch.next_revision) {
      watch.next_revision = line.revision + 1;
      watch.anchored = true;
      sink.progress(line.revision);
    }
    auto events = fragments.whole(line);
    if (!events.empty() && events.back().type == EventType::Put) remember(events.back().kv);
    bool wants_more = true;
    for (auto it = events.begin(); it != events.end();) {
      auto revision = it->revision;
      auto last = std::find_if(it, events.end(),
                               [&](const WatchEvent& e) { return e.revision != revision; });
      if (revision >= watch.next_revision) {
        wants_more = sink.deliver({std::make_move_iterator(it), std::make_move_iterator(last)});
        watch.next_revision = revision + 1;
        watch.anchored = true;
      }
      it = last;
    }
    return wants_more;
  }

  HubWatchPtr find(const HubStreamPtr& stream, std::int64_t id) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto it = stream->watches.find(id);
    return it == stream->watches.end() ? nullptr : it->second;
  }

  // Taking over.

  void take_over_soon(const HubStreamPtr& stream) { later(kLinger, &WatchHub::take_over, stream); }

  /// A stream that stands: the streams that it swallows end. Each one wholly or not at all: one
  /// that must be kept for some of its watches keeps them all.
  void take_over(ClientState& client, const HubStreamPtr& stream) {
    if (stream->over) return;
    if (!is_known(client, *stream) || !is_there(client, *stream)) return take_over_soon(stream);
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& victim : std::exchange(stream->victims, {})) {
      victim->swallowed = false;
      auto moved = [&](const auto& entry) { return stream->watches.count(entry.first) > 0; };
      if (std::all_of(victim->watches.begin(), victim->watches.end(), moved)) {
        detach(victim);
      } else {
        for (auto& entry : victim->watches) leave_stream(stream, entry.second, true);
      }
    }
    schedule();
  }

  /// When etcd was away it may have come back as another one. False: it could not be asked.
  bool is_known(ClientState& client, HubStream& stream) {
    if (!stream.returns) return true;
    auto now = compare(client, stream.past);
    if (!now) return false;
    stream.returns = false;
    if (now->first != History::Same) begin_anew(now->second, now->first == History::Another);
    return true;
  }

  /// All watches that follow the old history, of which the new one is at `revision`; in doubt those
  /// only that can read again.
  void begin_anew(std::int64_t revision, bool for_sure) {
    std::vector<HubWatchPtr> watches;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (for_sure) witness_.forget(revision), compacted_ = 0;
      for (auto& entry : watches_) {
        auto& watch = *entry.second;
        auto sink = watch.sink.lock();
        bool concerned = sink && watch.anchored && (for_sure || sink->reads_again());
        bool is_old =
            (watch.born < breaks_ && watch.born_below == 0) || watch.next_revision > revision + 1;
        if (concerned && is_old) watches.push_back(entry.second);
      }
    }
    for (auto& watch : watches) {
      end_watch(watch, [&](HubSink& sink) { sink.cut_off(revision, for_sure); });
    }
  }

  /// Whether etcd still has what the watches need that this stream takes from others; else it is
  /// about to cancel them. False: not known yet.
  bool is_there(ClientState& client, HubStream& stream) {
    RangeRequest range;
    const auto now = witness_.seen();
    range.revision = now + 1;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (auto& entry : stream.watches) {
        auto& watch = *entry.second;
        bool sooner = watch.next_revision < range.revision;
        if (watch.streams < 2 || !can_move(watch) || !sooner) continue;
        range.revision = watch.next_revision;
        range.key = watch.request.key;
      }
    }
    if (range.revision > now || ++stream.looks > kMostLooks) return true;
    auto there = client.peek(range, Context::with_timeout(kPatient));
    return there || (there.error().code != ErrorCode::Compacted && !is_out_of_reach(there.error()));
  }

  // Ends.

  void on_end(ClientState& client, const HubStreamPtr& stream, const Error& error) {
    bool denied = error.code == ErrorCode::PermissionDenied, first = false;
    std::vector<HubWatchPtr> refused;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      bool was_left = stream->over;
      auto carried = stream->watches;
      detach(stream);
      --ending_;
      if (was_left) return schedule();
      if (stream->open) ++breaks_;
      for (auto& other : streams_) {  // which may have taken its watches over to another history
        if (!stream->answered) break;
        other->returns = true;
        if (other->open) take_over_soon(other);
      }
      bool stood = stream->open && steady_clock::now() - stream->opened >= kStands;
      if (stood) backoff_.reset();
      short_lives_ = stood ? 1 : short_lives_ + 1;
      first = short_lives_ == 1;
      for (auto& [id, watch] : carried) {
        if (!denied || watch->streams > 0) continue;
        if (++watch->refusals >= kMostRefusals) refused.push_back(watch);
      }
      schedule(steady_clock::now() + backoff_.next());
    }
    if (denied) client.token_died(stream->place.token);
    for (auto& watch : refused) end_watch(watch, [&](HubSink& sink) { sink.failed(error); });
    (*client.log)(
        LogLevel::Info, "a watch stream has ended",
        {{"endpoint", client.members->url(stream->place.member)}, {"cause", to_string(error)}});
    if (first) client.leases->hurry();  // if it was etcd that went away, they may have gone, too
  }

  // The rest is called under the mutex, but for end_watch().

  /// Takes the stream out.
  void detach(const HubStreamPtr& stream) {
    if (stream->over.exchange(true)) return;
    ++ending_;
    streams_.erase(std::remove(streams_.begin(), streams_.end(), stream), streams_.end());
    settled_.notify_all();
    for (auto& victim : std::exchange(stream->victims, {})) victim->swallowed = false;
    for (auto& entry : std::exchange(stream->watches, {})) has_left(*stream, entry.second);
    cancel(*stream);
  }

  /// Without the mutex, which whoever hears of it may need.
  void cancel(const HubStream& stream) {
    executor_->timer.after(milliseconds(0), [ctx = stream.ctx] { ctx.cancel(); });
  }

  /// The watch leaves a stream, which ends when it has none left.
  void leave_stream(const HubStreamPtr& stream, const HubWatchPtr& watch, bool served) {
    if (stream->watches.erase(watch->id) == 0) return;
    has_left(*stream, watch);
    if (served) ++stream->dead;
    if (stream->watches.empty()) return detach(stream);
    if (stream->open && stream->dead >= stream->watches.size()) schedule();
  }

  /// It waits for another stream, if no other carries it.
  void has_left(const HubStream& stream, const HubWatchPtr& watch) {
    watch->heard = (std::max)(watch->heard, stream.last_heard());
    if (--watch->streams == 0 && watch->state == State::Open) wait_again(watch);
  }

  /// The watch leaves all streams.
  void leave(const HubWatchPtr& watch, State state) {
    watch->state = state;
    auto streams = streams_;
    for (auto& stream : streams) leave_stream(stream, watch, true);
    waiting_.erase(std::remove(waiting_.begin(), waiting_.end(), watch), waiting_.end());
    if (state == State::Over) watches_.erase(watch->id);
  }

  void wait_again(const HubWatchPtr& watch) {
    watch->state = State::Waiting;
    waiting_.push_back(watch);
  }

  void end_watch(const HubWatchPtr& watch, const std::function<void(HubSink&)>& tell) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (watch->state == State::Over) return;
      leave(watch, State::Over);
    }
    if (auto sink = watch->sink.lock()) tell(*sink);
  }

  const std::weak_ptr<ClientState> client_;
  const std::shared_ptr<Executor> executor_;
  std::mutex mutex_;
  std::condition_variable settled_;
  std::map<std::int64_t, HubWatchPtr> watches_;
  std::vector<HubWatchPtr> waiting_;
  std::vector<HubStreamPtr> streams_;
  std::size_t ending_{0};  // streams that were left
  std::int64_t last_id_{0};
  StreamPolicy policy_;
  std::optional<SteadyTime> open_at_;
  std::int64_t compacted_{0};  // the history begins here, as far as we know
  Witness witness_;
  std::uint64_t breaks_{0};  // of streams
  int short_lives_{0};       // of streams, one after the other
  Backoff backoff_{milliseconds(20), milliseconds(1000)};
  bool supervised_{false}, stuck_{false}, closed_{false};
};

COORDINATION_API bool ClientState::tell_streams(std::size_t member, Sign sign) {
  return watches && watches->hear_of(member, sign);
}

// What stands on the hub.

/// Takes the events of a RangeFeed, and its end, for a reader or for handlers.
class EventPort {
 public:
  EventPort(std::shared_ptr<ClientState> c, std::string w)
      : client(std::move(c)), what(std::move(w)) {}
  virtual ~EventPort() = default;

  /// False: full.
  virtual bool push(WatchEvent event) = 0;
  /// All changes up to `revision` were pushed. It goes back only where the history is another.
  virtual void moved(std::int64_t revision) { static_cast<void>(revision); }
  virtual bool ready() = 0;

  /// From now on there are handlers.
  void call_handlers() {
    auto& executor = client->executor;
    strand =
        std::make_shared<Strand>(executor, executor->callbacks, client->log, "that of " + what);
    ended.emplace(strand);
  }
  /// It is over, for good. Handlers are told, unless it is by their own will.
  void failed(const Error& error) {
    {
      std::lock_guard<std::mutex> lock(gate.mutex);
      if (end) return;
      end = error;
      gate.changed.notify_all();
    }
    if (!ended || error.code == ErrorCode::Cancelled) return;
    (*client->log)(LogLevel::Error, "a watch has ended",
                   {{"which", what}, {"cause", to_string(error)}});
    ended->fire(error);
  }

  const std::shared_ptr<ClientState> client;
  const std::string what;  // for texts: "a watch of <key>"
  Gate gate;
  std::optional<Error> end{};  // its mutex guards it
  std::shared_ptr<Strand> strand;
  std::optional<LossSignal> ended;
};

/// The watch of one range: raw, or live. A live one knows what is there, so that it can add the
/// last record to a Delete and deliver the difference after a compaction.
class RangeFeed : public HubSink, public std::enable_shared_from_this<RangeFeed> {
 public:
  /// ByAge is Live for a queue of keys, in which the oldest counts.
  enum class Mode { Raw, Live, LiveWithValues, ByAge };
  using Known = std::map<std::string, KeyValue>;

  RangeFeed(std::shared_ptr<ClientState> client, WatchRequest request, Mode mode)
      : client_(std::move(client)), request_(std::move(request)), mode_(mode) {}

  /// To begin "now" is to begin after the revision of a read: a start that stays right however
  /// often the first connection has to be tried. It also tells at once who may not read.
  Result<void> start(const std::shared_ptr<EventPort>& port, bool include_existing,
                     const Context& given) {
    if (client_->closing) return closed_error();
    auto ctx = client_->bounded(given);
    port_ = port;
    auto next = request_.start_revision;
    if (mode_ != Mode::Raw) {
      auto all = read(ctx);
      if (!all) return all.error();
      next = all->second + 1;
      take_in(*port, std::move(*all), include_existing);
    } else if (next == 0) {
      auto now = client_->peek(range_of(request_), ctx);
      if (!now) return now.error();
      if (!now->kvs.empty()) client_->watches->remember(now->kvs.front());
      next = now->revision + 1;
    }
    join_hub(next);
    client_->watches->settle_few();
    return {};
  }
  void resume() { client_->watches->resume(hub_id_); }
  void stop() {
    stopped_ = true;
    client_->watches->remove(hub_id_);
  }

  template <class Fn>
  auto look(Fn&& fn) const {
    std::lock_guard<std::mutex> lock(mutex_);
    return fn(known_, revision_);
  }
  bool connected() const { return client_->watches->connected(hub_id_); }
  milliseconds age() const {
    if (connected()) return milliseconds(0);
    auto heard = (std::max)(client_->watches->last_heard(hub_id_), heard_at_.load());
    return std::chrono::duration_cast<milliseconds>(client_->clock->now() - heard);
  }
  const std::shared_ptr<ClientState>& client() const { return client_; }
  const std::string& key() const { return request_.key; }

  bool deliver(std::vector<WatchEvent> events) override {
    auto port = port_.lock();
    if (!port || stopped_) return false;
    std::lock_guard<std::mutex> lock(mutex_);
    // A stream that was left may still have a line; what was read anew has it already.
    if (mode_ != Mode::Raw && events.front().revision <= revision_) return true;
    revision_ = (std::max)(revision_, events.front().revision);
    bool more = true;
    for (auto& event : news(std::move(events))) more = port->push(std::move(event));
    port->moved(revision_);
    return more;
  }
  bool ready() override {
    auto port = port_.lock();
    return port && !stopped_ && port->ready();
  }
  void progress(std::int64_t revision) override {
    auto port = port_.lock();
    std::lock_guard<std::mutex> lock(mutex_);
    revision_ = (std::max)(revision_, revision);
    if (port) port->moved(revision_);
  }
  bool reads_again() const override { return mode_ != Mode::Raw; }
  void cut_off(std::int64_t revision, bool another) override {
    heard_at_ = client_->clock->now();
    auto port = port_.lock();
    if (another) {
      std::lock_guard<std::mutex> lock(mutex_);
      for (auto& entry : known_) entry.second.mod_revision = 0;  // so nothing is the same
    }
    if (another && port) port->moved(0);
    if (reads_again()) return resync_later(milliseconds(0));
    std::string why = another ? "etcd's store is another one, now at revision "
                              : "etcd has discarded the history up to revision ";
    auto error = make_error(ErrorCode::Compacted, "events of " + request_.key + " are missing",
                            why + std::to_string(revision));
    error.revision = revision + 1;
    failed(error);
  }
  void failed(const Error& error) override {
    heard_at_ = client_->clock->now();
    if (auto port = port_.lock()) port->failed(error);
  }

 private:
  static constexpr milliseconds kLongestResync = std::chrono::minutes(10);

  Result<Records> read(const Context& ctx) const {
    auto all = read_range(*client_, range_of(request_), ctx);
    if (!all) return all;
    for (auto& kv : all->first) client_->watches->remember(kv);
    return all;
  }

  void join_hub(std::int64_t next_revision) {
    bool anchored = mode_ != Mode::Raw || request_.start_revision == 0;
    auto id = client_->watches->add(request_, next_revision, anchored, weak_from_this());
    raise_to(hub_id_, id);  // it may be over already, and resync() have joined again: ids grow
    if (stopped_) stop();
    if (id == 0) failed(closed_error());
    if (ready()) resume();  // it may have been parked, and emptied, before its id was known
  }

  void keep(const KeyValue& kv) {
    KeyValue& known = known_[kv.key];
    known = kv;
    if (mode_ != Mode::LiveWithValues) std::string().swap(known.value);
  }

  /// False: a Delete of what is not known.
  bool learn(WatchEvent& event) {
    auto it = known_.find(event.kv.key);
    bool known = it != known_.end();
    if (event.type == EventType::Put) {
      if (known) event.prev_kv = it->second;
      keep(event.kv);
      return true;
    }
    if (!known) return false;
    event.prev_kv = std::move(it->second);
    known_.erase(it);
    return true;
  }

  /// What was not known of these events, in the order in which it is told: of what happens at once
  /// in a queue puts first, the oldest key first, then deletes, the youngest first. So no key seems
  /// to be the oldest for a moment that never was.
  std::vector<WatchEvent> news(std::vector<WatchEvent> events) {
    if (mode_ == Mode::Raw) return events;
    std::vector<WatchEvent> news;
    for (auto& event : events) {
      if (learn(event)) news.push_back(std::move(event));
    }
    auto rank = [](const WatchEvent& event) {
      bool put = event.type == EventType::Put;
      auto age = put ? event.kv.create_revision : -event.prev_kv->create_revision;
      return std::make_tuple(put ? 0 : 1, age, event.kv.key);
    };
    auto older = [&](const WatchEvent& a, const WatchEvent& b) { return rank(a) < rank(b); };
    if (mode_ == Mode::ByAge) sort_stably(news, older);
    return news;
  }

  /// Knows from now on what was read, and says what is different: what was changed, in order, then
  /// what is gone. At first it is what is there, the oldest first.
  void take_in(EventPort& port, Records read, bool tell) {
    std::lock_guard<std::mutex> lock(mutex_);
    bool first = revision_ == 0;
    auto gone = known_;
    std::vector<WatchEvent> events;
    for (auto& kv : read.first) {
      auto node = gone.extract(kv.key);
      if (node && node.mapped().mod_revision == kv.mod_revision) continue;
      WatchEvent event;
      event.revision = kv.mod_revision;
      event.kv = std::move(kv);
      events.push_back(std::move(event));
    }
    auto place = [first](const WatchEvent& e) { return first ? e.kv.create_revision : e.revision; };
    sort_stably(events,
                [&](const WatchEvent& a, const WatchEvent& b) { return place(a) < place(b); });
    for (auto& entry : gone) events.push_back(deleted(entry.first, read.second));
    revision_ = read.second;
    heard_at_ = client_->clock->now();
    for (auto& event : news(std::move(events))) {
      if (tell) port.push(std::move(event));
    }
    // After those that stand in a queue at first: it may be empty, and that is news, too.
    if (mode_ == Mode::ByAge && first && tell) port.push(deleted(request_.key, read.second));
    port.moved(revision_);
  }

  static WatchEvent deleted(const std::string& key, std::int64_t revision) {
    WatchEvent event;
    event.type = EventType::Delete;
    event.kv.key = key;
    event.revision = event.kv.mod_revision = revision;
    return event;
  }

  void resync_later(milliseconds delay) {
    if (stopped_) return;
    auto& executor = *client_->executor;
    executor.run_at(steady_clock::now() + delay, executor.readers, [weak = weak_from_this()] {
      if (auto self = weak.lock()) self->resync();
    });
  }

  void resync() {
    auto port = port_.lock();
    if (!port || stopped_ || client_->closing) return;
    auto all = read(Context::with_timeout(resync_limit_));
    if (all) {
      backoff_.reset();
      auto revision = all->second;
      take_in(*port, std::move(*all), true);
      return join_hub(revision + 1);
    }
    if (all.error().code == ErrorCode::PermissionDenied) return failed(all.error());
    (*client_->log)(LogLevel::Warn, "cannot read again after a compaction",
                    {{"key", request_.key}, {"cause", to_string(all.error())}});
    resync_limit_ = (std::min)(resync_limit_ * 2, kLongestResync);
    resync_later(backoff_.next());
  }

  const std::shared_ptr<ClientState> client_;
  const WatchRequest request_;
  const Mode mode_;
  std::weak_ptr<EventPort> port_;
  std::atomic<std::int64_t> hub_id_{0};
  std::atomic<bool> stopped_{false};
  std::atomic<SteadyTime> heard_at_{SteadyTime{}};
  mutable std::mutex mutex_;
  Known known_;
  std::int64_t revision_{0};
  milliseconds resync_limit_{kPatient};  // grows, for a range that is too large for it
  Backoff backoff_{milliseconds(100), milliseconds(2000)};
};

/// A bounded queue of events, read by next() or by a handler. While it is read, more than its
/// capacity may wait for a moment: a full queue costs a new stream.
class Mailbox : public EventPort,
                public SubscriptionState,
                public std::enable_shared_from_this<Mailbox> {
 public:
  using Handler = std::function<void(WatchEvent)>;

  Mailbox(std::shared_ptr<RangeFeed> feed, std::size_t capacity)
      : EventPort(feed->client(), "a watch of " + feed->key()), feed_(std::move(feed)),
        capacity_((std::max<std::size_t>)(capacity, 1)) {}

  /// Before the feed starts.
  void set_handler(Handler handler) {
    call_handlers();
    handler_ = std::move(handler);
  }
  void on_end(std::function<void(const Error&)> handler) override {
    if (ended) ended->add(std::move(handler));
  }

  Result<void> start(bool include_existing, const Context& ctx) {
    return feed_->start(shared_from_this(), include_existing, ctx);
  }

  bool push(WatchEvent event) override {
    std::lock_guard<std::mutex> lock(gate.mutex);
    if (end) return false;
    bytes_ += size_of(event);
    if (events_.empty() && (strand || readers_ > 0)) taken_at_ = steady_clock::now();
    events_.push_back(std::move(event));
    gate.changed.notify_one();
    if (strand)
      strand->post([self = shared_from_this()] {
        if (auto next = self->take()) self->handler_(std::move(*next));
      });
    bool is_read = steady_clock::now() - taken_at_ < kAwake && bytes_ < kSpare;
    if (events_.size() >= capacity_ && !is_read) full_ = true;
    return !full_;
  }

  bool ready() override {
    std::lock_guard<std::mutex> lock(gate.mutex);
    return !full_ && !end;
  }

  Result<WatchEvent> next(const Context& ctx) {
    if (auto event = take()) return std::move(*event);
    auto& open = client->open;
    auto both = join_contexts({&ctx, &open});
    ++readers_;
    bool ready = gate.wait(both, [&] { return !events_.empty() || end; });
    --readers_;
    if (auto event = take()) return std::move(*event);
    if (!ready) return open.cancelled() ? closed_error() : context_error(ctx, "there was no event");
    std::lock_guard<std::mutex> lock(gate.mutex);
    return end ? *end : make_error(ErrorCode::Conflict, "another reader was faster");
  }

  void cancel() override {
    {
      std::lock_guard<std::mutex> lock(gate.mutex);
      end = make_error(ErrorCode::Cancelled, "the watch was cancelled");
      events_.clear();
      bytes_ = 0;
      gate.changed.notify_all();
    }
    feed_->stop();
    if (strand) strand->close();
  }

 private:
  static constexpr milliseconds kAwake{100};
  static constexpr std::size_t kSpare = 1 << 20;

  static std::size_t size_of(const WatchEvent& event) {
    return 256 + event.kv.key.size() + event.kv.value.size() +
           (event.prev_kv ? event.prev_kv->value.size() : 0);
  }

  std::optional<WatchEvent> take() {
    std::optional<WatchEvent> event;
    bool resume = false;
    {
      std::lock_guard<std::mutex> lock(gate.mutex);
      taken_at_ = steady_clock::now();
      if (events_.empty()) return event;
      event = std::move(events_.front());
      events_.pop_front();
      bytes_ -= size_of(*event);
      resume = full_ && events_.size() <= capacity_ / 2;
      if (resume) full_ = false;
    }
    if (resume) feed_->resume();
    return event;
  }

  const std::shared_ptr<RangeFeed> feed_;
  const std::size_t capacity_;
  std::list<WatchEvent> events_;
  std::size_t bytes_{0};
  std::atomic<int> readers_{0};  // that wait
  SteadyTime taken_at_{};
  bool full_{false};
  Handler handler_;
};

/// A Mailbox whose events are read as `Event`; those that cannot be are skipped.
template <class Event>
class MailboxSource : public EventSource<Event> {
 public:
  using Decode = std::function<std::optional<Event>(WatchEvent)>;
  MailboxSource(std::shared_ptr<Mailbox> mailbox, Decode decode)
      : mailbox_(std::move(mailbox)), decode_(std::move(decode)) {}

  Result<Event> next(const Context& ctx) override {
    while (true) {
      auto event = mailbox_->next(ctx);
      if (!event) return event.error();
      if (auto decoded = decode_(std::move(*event))) return std::move(*decoded);
    }
  }
  void cancel() override { mailbox_->cancel(); }

 private:
  std::shared_ptr<Mailbox> mailbox_;
  Decode decode_;
};

/// How a watch is to be made; every watch function is one of the two below with one of these.
template <class Event>
struct WatchPlan {
  std::shared_ptr<ClientState> client;
  WatchRequest request;
  RangeFeed::Mode mode{RangeFeed::Mode::Raw};
  bool include_existing{false};
  std::function<std::optional<Event>(WatchEvent)> decode;

  std::shared_ptr<Mailbox> mailbox() const {
    auto feed = std::make_shared<RangeFeed>(client, request, mode);
    return std::make_shared<Mailbox>(std::move(feed), request.queue_size);
  }
};

template <class Event>
Result<Watch<Event>> open_watch(const Result<WatchPlan<Event>>& plan, const Context& ctx) {
  if (!plan) return plan.error();
  auto mailbox = plan->mailbox();
  auto started = mailbox->start(plan->include_existing, ctx);
  if (!started) return started.error();
  return Watch<Event>(std::make_shared<MailboxSource<Event>>(std::move(mailbox), plan->decode));
}

template <class Event>
Result<Subscription> subscribe(const Result<WatchPlan<Event>>& plan,
                               std::function<void(const Event&)> handler, const Context& ctx) {
  if (!plan) return plan.error();
  if (!handler) return invalid("a handler is empty");
  auto mailbox = plan->mailbox();
  mailbox->set_handler([decode = plan->decode, handler = std::move(handler)](WatchEvent event) {
    if (auto decoded = decode(std::move(event))) handler(*decoded);
  });
  auto started = mailbox->start(plan->include_existing, ctx);
  if (!started) return mailbox->cancel(), started.error();
  return Subscription(std::move(mailbox));
}

COORDINATION_API Result<WatchPlan<WatchEvent>> raw_plan(std::shared_ptr<ClientState> client,
                                                        WatchRequest request) {
  if (request.key.empty() && request.range_end.empty()) return empty_key();
  if (request.start_revision < 0) return invalid("a start revision is negative");
  if (request.no_put && request.no_delete) return invalid("a watch filters out all events");
  WatchPlan<WatchEvent> plan;
  plan.client = std::move(client);
  plan.request = std::move(request);
  plan.decode = [](WatchEvent event) { return std::optional<WatchEvent>(std::move(event)); };
  return plan;
}

}  // namespace detail

COORDINATION_API const char* to_string(EventType type) {
  return type == EventType::Put ? "PUT" : "DELETE";
}

COORDINATION_API Result<Watch<WatchEvent>> Client::watch(WatchRequest request, Context ctx) {
  return detail::open_watch(detail::raw_plan(state_, std::move(request)), ctx);
}

COORDINATION_API Result<Watch<WatchEvent>> Client::watch(std::string key, Context ctx) {
  return watch(WatchRequest{std::move(key)}, std::move(ctx));
}

COORDINATION_API Result<Subscription> Client::watch(WatchRequest request,
                                                    std::function<void(const WatchEvent&)> handler,
                                                    Context ctx) {
  return detail::subscribe(detail::raw_plan(state_, std::move(request)), std::move(handler), ctx);
}

// == 8. Lock ====================================================================================

namespace detail {

struct RegistryState;

/// What a Coordinator's handles share.
struct CoordinatorState {
  std::shared_ptr<ClientState> client;
  std::shared_ptr<RegistryState> registry;  // of section 10

  std::mutex mutex;
  std::condition_variable changed;
  std::thread::id closer;  // the mutex guards these
  bool closed{false};

  std::string path(const char* service, const std::string& key) const {
    return client->options.key_prefix + service + key;
  }
};

/// A key is segments joined by '/': none empty, none that a path would resolve.
COORDINATION_API Result<void> validate_key(const std::string& key, const char* what) {
  std::size_t begin = 0;
  while (true) {
    auto end = (std::min)(key.find('/', begin), key.size());
    std::string_view segment = std::string_view{key}.substr(begin, end - begin);
    if (segment.empty() || segment == "." || segment == "..") {
      auto kind = segment.empty() ? "an empty" : "a relative";
      return invalid(std::string("the ") + what + " \"" + key + "\" has " + kind + " segment");
    }
    if (end == key.size()) return {};
    begin = end + 1;
  }
}

/// A key that is ours as long as its lease lives and nobody deletes it: a lock or an office.
/// Reports its loss once.
struct OwnedKey : HubSink, std::enable_shared_from_this<OwnedKey> {
  enum class Phase { Held, Lost, Released };

  OwnedKey(std::shared_ptr<ClientState> c, std::string k, std::int64_t t, LeasePtr l)
      : client(std::move(c)), key(std::move(k)), token(t), leases{std::move(l)},
        loss(std::make_shared<Strand>(client->executor, client->executor->losses, client->log,
                                      "on_lost of " + key)) {
    ours = Compare::create_revision(key, Compare::Is::Equal, token);
  }

  const std::shared_ptr<ClientState> client;
  const std::string key;
  const std::int64_t token;  // create revision
  Compare ours;              // true in a Txn while the key is ours
  std::mutex mutex;
  std::vector<LeasePtr> leases;  // the key hangs on one, most likely the first; the mutex guards it
  std::atomic<Phase> phase{Phase::Held};
  std::atomic<std::int64_t> hub_id{0};
  LossSignal loss;
  Turnstile renewing;

  /// A key that is soon given back is not worth a watch.
  static constexpr milliseconds kWatchAfter{250};

  LeasePtr present_lease() {
    std::lock_guard<std::mutex> lock(mutex);
    return leases.front();
  }
  bool is_settled() {
    std::lock_guard<std::mutex> lock(mutex);
    return leases.size() == 1;
  }
  bool held() {
    if (phase != Phase::Held) return false;
    std::lock_guard<std::mutex> lock(mutex);
    return std::all_of(leases.begin(), leases.end(), [](const auto& l) { return l->held(); });
  }

  /// Follows the lease, and after a while the key.
  void begin() {
    client->waited = 0;  // etcd answers
    attach(present_lease());
    client->executor->timer.after(kWatchAfter, [weak = weak_from_this()] {
      if (auto self = weak.lock()) self->watch_from(self->token + 1);
    });
  }

  void attach(const LeasePtr& to) {
    to->set_hook([weak = weak_from_this()](const Error& error) {
      if (auto self = weak.lock()) self->lost(error.cause);
    });
    if (to->phase != LeaseState::Phase::Live && !client->closing) lost("its lease is lost");
  }

  void watch_from(std::int64_t revision) {
    if (phase != Phase::Held || client->closing) return;
    WatchRequest request;
    request.key = key;
    request.no_put = true;
    hub_id = client->watches->add(std::move(request), revision, true, weak_from_this());
    if (phase != Phase::Held) client->watches->remove(hub_id);
  }

  void lost(const std::string& why) {
    auto held = Phase::Held;
    if (!phase.compare_exchange_strong(held, Phase::Lost)) return;
    client->watches->remove(hub_id);
    auto error = make_error(ErrorCode::Lost, key + " is lost", why);
    (*client->log)(LogLevel::Warn, "a key that was ours is lost", {{"key", key}, {"why", why}});
    give_up_leases();
    loss.fire(error);
  }

  /// The key may be on its way to another lease. False: it is not ours any more.
  bool add_lease(const LeasePtr& other) {
    attach(other);  // whichever is lost, the key may go with it
    std::lock_guard<std::mutex> lock(mutex);
    if (phase == Phase::Held) leases.push_back(other);
    return phase == Phase::Held;
  }
  /// It has not gone there.
  void remove_lease(const LeasePtr& other) {
    std::lock_guard<std::mutex> lock(mutex);
    leases.erase(std::remove(leases.begin(), leases.end(), other), leases.end());
  }
  /// It hangs on this one of them, and on no other. False: it is not ours any more.
  bool settle_on(const LeasePtr& lease) {
    std::lock_guard<std::mutex> lock(mutex);
    if (phase != Phase::Held) return false;
    for (auto& other : std::exchange(leases, {lease})) {
      if (other != lease) client->leases->drop(other);
    }
    return true;
  }

  void give_up_leases() {
    std::lock_guard<std::mutex> lock(mutex);
    for (auto& lease : leases) client->leases->drop(lease);
  }

  // HubSink.

  bool deliver(std::vector<WatchEvent>) override { return lost("the key was deleted"), true; }
  void cut_off(std::int64_t, bool) override {
    client->executor->run(client->executor->background, [weak = weak_from_this()] {
      if (auto self = weak.lock()) self->look_again();
    });
  }

  /// The watch has missed something: is the key still ours?
  void look_again() {
    if (phase != Phase::Held || client->closing) return;
    Txn txn;
    txn.when(ours);
    auto now = client->commit(txn, Safety::Read, Context::with_timeout(kPatient));
    if (now && now->succeeded) return watch_from(now->revision + 1);
    if (now) return lost("the key was deleted");
    client->executor->timer.after(milliseconds(500), [weak = weak_from_this()] {
      if (auto self = weak.lock()) self->cut_off(0, false);
    });
  }

  // For the handles.

  Error lost_error() const { return make_error(ErrorCode::Lost, key + " is not ours any more"); }

  /// Held -> Released, or why not.
  Result<void> begin_release() {
    loss.shut();
    if (client->closing) return closed_error();
    auto was = phase.exchange(Phase::Released);
    client->watches->remove(hub_id);
    if (was == Phase::Released) return invalid(key + " was given up before");
    if (was == Phase::Lost) return lost_error();
    return {};
  }

  /// Deletes the key if it is ours, and keeps the lease for the next one.
  Result<void> release(const Context& ctx) {
    auto begun = begin_release();
    if (!begun) return begun;
    Txn txn;
    txn.when(ours).then(Op::remove(key));
    bool repeated = false;
    auto done = client->commit(txn, Safety::Idempotent, ctx, &repeated);
    if (!done || !done->succeeded) {
      give_up_leases();
      if (!done) return done.error();
      if (!repeated) return lost_error();
      return make_error(ErrorCode::Connection, key + " is gone",
                        "perhaps by this call: the answer to it was lost", Outcome::MaybeApplied);
    }
    client->waited = 0;
    std::lock_guard<std::mutex> lock(mutex);
    for (std::size_t i = 1; i < leases.size(); ++i) client->leases->drop(leases[i]);
    client->leases->give_back(leases.front());
    return {};
  }

  /// What a handle's destructor does.
  void abandon() {
    if (phase != Phase::Released) {
      within_patience(*client, [this](const Context& ctx) { return release(ctx); });
    }
    loss.close();
  }

  Result<void> require_held() {
    if (client->closing) return closed_error();
    if (phase == Phase::Released) return invalid(key + " was given up before");
    if (!held()) return lost_error();
    return {};
  }

  /// One at a time: two moves must not overtake each other.
  Result<void> renew(milliseconds ttl, const Context& given) {
    auto ctx = client->bounded(given);
    if (!renewing.enter(ctx)) return context_error(ctx, key + " was not renewed");
    auto done = renew_in_turn(ttl, ctx);
    renewing.leave();
    return done;
  }

  Result<void> renew_in_turn(milliseconds ttl, const Context& ctx) {
    auto usable = require_held();
    if (!usable) return usable;
    auto present = present_lease();
    bool stays = is_settled() && seconds_up(ttl) == seconds_up(present->asked);
    if (!stays) return move_to_new_lease(ttl, ctx);
    auto renewed = client->leases->renew_now(present, ctx);
    if (!renewed && renewed.error().code == ErrorCode::Lost) return lost_error();
    return renewed;
  }

  Result<void> move_to_new_lease(milliseconds ttl, const Context& ctx) {
    auto fresh = client->leases->grant(ttl, ctx);
    if (!fresh) return fresh.error();
    if (!add_lease(*fresh)) return client->leases->drop(*fresh), lost_error();
    PutRequest put;
    put.key = key;
    put.lease = (*fresh)->id;
    put.ignore_value = true;
    auto done = guarded_commit(Txn().then(Op::put(put)), ctx, Safety::Idempotent);
    if (done) return settle_on(*fresh) ? Result<void>() : lost_error();
    // Where nobody knows whether it has moved, all of them are kept alive.
    if (done.error().outcome == Outcome::MaybeApplied) return done.error();
    remove_lease(*fresh);
    return client->leases->drop(*fresh), done.error();
  }

  /// `txn` inside the guard; its answer. As one flat Txn if it can be: etcd does not count what a
  /// nested one puts against its quota.
  Result<TxnResponse> guarded_commit(Txn txn, const Context& ctx, Safety safety) {
    auto usable = require_held();
    if (!usable) return usable.error();
    bool nested = !txn.compare.empty();
    Txn outer;
    outer.when(ours);
    if (nested) {
      outer.then(Op::txn(std::move(txn)));
    } else {
      outer.success = std::move(txn.success);
    }
    auto done = client->commit(outer, safety, ctx);
    if (!done) return done.error();
    if (!done->succeeded) {
      lost("the key was deleted");
      return lost_error();
    }
    if (!nested) return done;
    using Inner = std::shared_ptr<const TxnResponse>;
    auto* inner = done->responses.empty() ? nullptr : std::get_if<Inner>(&done->responses.front());
    if (!inner) return make_error(ErrorCode::Internal, "a nested Txn has no answer");
    TxnResponse answer = **inner;
    answer.revision = done->revision;
    return answer;
  }

  /// One operation inside the guard.
  template <class Response>
  Result<Response> guarded_op(Op op, const Context& ctx) {
    auto done = guarded_commit(Txn().then(std::move(op)), ctx, Safety::Write);
    if (!done) return done.error();
    auto* answer =
        done->responses.empty() ? nullptr : std::get_if<Response>(&done->responses.front());
    auto response = answer ? *answer : Response();
    response.revision = done->revision;
    return response;
  }
};

using OwnedKeyPtr = std::shared_ptr<OwnedKey>;

/// Another value for the key; of two that were sent, the later one stays, however late the first
/// arrives.
COORDINATION_API Result<std::int64_t> replace_value(OwnedKey& owned, const std::string& value,
                                                    const Context& given) {
  auto ctx = owned.client->bounded(given);
  for (bool sent = false;; sent = true) {
    Txn look;
    look.then(Op::get(owned.key));
    auto now = owned.guarded_commit(std::move(look), ctx, Safety::Read);
    if (!now) return now.error();
    auto& kvs = now->range(0).kvs;
    if (kvs.empty()) return owned.lost_error();
    if (sent && kvs.front().value == value) return kvs.front().mod_revision;
    Txn txn;
    txn.when(Compare::mod_revision(owned.key, Compare::Is::Equal, kvs.front().mod_revision));
    txn.then(Op::put(owned.key, value, owned.present_lease()->id));
    auto done = owned.guarded_commit(std::move(txn), ctx, Safety::Idempotent);
    if (!done) return done.error();
    if (done->succeeded) return done->revision;
  }
}

/// The values of shared holders' keys begin with it, no others do. All strings that do are between
/// these two.
inline constexpr const char* kShared = "shared";
inline constexpr const char* kBelowShared = "sharec\xff";
inline constexpr const char* kAboveShared = "sharee";

COORDINATION_API bool is_shared(const std::string& value) {
  return value.compare(0, std::strlen(kShared), kShared) == 0;
}

/// A key under `prefix` that belongs to another queue, whose name begins with that of this one: the
/// last segment of a key is its lease.
COORDINATION_API bool of_another_queue(const std::string& key, const std::string& prefix) {
  return key.find('/', prefix.size()) != std::string::npos;
}

/// Of all keys that begin with `prefix`.
template <class Request>
Request request_under(std::string prefix) {
  Request request;
  request.range_end = prefix_range_end(prefix);
  request.key = std::move(prefix);
  return request;
}

/// Of equals the one with the lower key, as etcd sorts them.
COORDINATION_API RangeRequest oldest_under(const std::string& prefix, std::int64_t limit = 1) {
  auto range = request_under<RangeRequest>(prefix);
  range.sort_order = SortOrder::Ascend;
  range.sort_target = SortTarget::Create;
  range.limit = limit;
  return range;
}

/// Who may hold, given those who came earlier.
struct QueueRule {
  enum class Kind { Exclusive, Shared, Permits };
  Kind kind{Kind::Exclusive};
  std::int64_t permits{1};
};

/// What waiting does not mend.
COORDINATION_API bool is_final(const Error& error) {
  return error.code == ErrorCode::Validation || error.code == ErrorCode::PermissionDenied ||
         error.code == ErrorCode::Conflict;
}

/// One who wants a place at the head of a queue of keys under a prefix, ordered by create
/// revision. After etcd's client/v3/concurrency/key.go and mutex.go, with these differences: the
/// watch is made before the read that it depends on (one that begins in the past is served by a
/// timer of 100 ms); the own key is watched, too, and is looked at again after waiting: who clears
/// a whole queue deletes it in the same revision as those before it.
class Contender {
 public:
  Contender(std::shared_ptr<ClientState> client, std::string prefix, QueueRule rule,
            std::string value, milliseconds ttl)
      : client_(std::move(client)), prefix_(std::move(prefix)), rule_(rule),
        value_(std::move(value)), ttl_(ttl) {}

  Result<OwnedKeyPtr> acquire(const Context& ctx) {
    auto waiting = join_contexts({&ctx, &client_->open});
    while (true) {
      auto prepared = prepare(ctx);
      auto turn = prepared ? take_place(ctx) : prepared.error();
      client_->contended = turn && turn->place == Place::Behind;
      while (turn && turn->place == Place::Behind) turn = wait(*turn, ctx);
      if (turn && turn->place == Place::Head && lease_->held()) return own();
      if (!turn && (client_->closing || is_final(turn.error()))) return give_up(turn.error());
      // To the end of the queue if the lease or the key has died meanwhile; in an outage, again.
      if (turn) client_->leases->drop(lease_);
      if (!turn && (cause_.empty() || !waiting.done())) cause_ = to_string(turn.error());
      if (!pause(waiting, backoff_.next())) return give_up(not_acquired(ctx));
    }
  }

  Result<OwnedKeyPtr> try_acquire(const Context& given) {
    auto ctx = client_->bounded(given);
    for (int attempt = 0; attempt < 2; ++attempt) {
      auto prepared = prepare(ctx);
      if (!prepared) return give_up(prepared.error());
      bool exclusive = rule_.kind == QueueRule::Kind::Exclusive;
      auto turn = exclusive ? enter_if_free(ctx) : enter(ctx);
      if (!turn) return give_up(turn.error());
      if (turn->place == Place::Head && lease_->held()) return own();
      if (turn->place == Place::Gone) {  // the kept lease had died
        client_->leases->drop(lease_);
        continue;
      }
      if (queued_ && !step_back(ctx)) lease_->tainted = true;
      client_->leases->give_back(lease_);
      return make_error(ErrorCode::Conflict, name() + " is taken", cause_);
    }
    return make_error(ErrorCode::Lost, "the lease was lost before the lock was ours");
  }

 private:
  static constexpr std::chrono::seconds kPatience{15};
  static constexpr std::int64_t kFewShared = 16;

  enum class Place { Head, Behind, Gone };
  struct Turn {
    Place place{Place::Gone};
    std::vector<std::string> blockers;  // nothing changes as long as all these keys are there
  };

  std::string name() const { return prefix_.substr(0, prefix_.size() - 1); }

  /// With the lease at hand, or with another.
  Result<void> prepare(const Context& ctx) {
    if (client_->closing) return closed_error();
    if (ctx.done()) return context_error(ctx, name() + " was not asked for", "it had ended before");
    if (lease_ && lease_->held()) return {};
    // Where one that was kept is dead, others may be, too: the next one is new.
    if (lease_) client_->leases->drop(lease_);
    auto lease = lease_ ? client_->leases->grant(ttl_, ctx) : client_->leases->take(ttl_, ctx);
    if (!lease) return lease.error();
    lease_ = std::move(*lease);
    key_ = prefix_ + lease_hex(lease_->id);
    return {};
  }

  OwnedKeyPtr own() {
    auto owned = std::make_shared<OwnedKey>(client_, key_, token_, lease_);
    owned->begin();
    return owned;
  }

  /// Leaves the queue; true if the key is certainly gone.
  bool step_back(const Context& ctx) {
    Txn txn;
    txn.when(Compare::create_revision(key_, Compare::Is::Equal, token_)).then(Op::remove(key_));
    return client_->commit(txn, Safety::Idempotent, ctx).has_value();
  }

  /// Leaves nothing behind: with the lease goes the key, also one that etcd makes only now. The
  /// caller's time is over: what takes longer is done in the background.
  Error give_up(Error error) {
    if (lease_ && lease_->phase == LeaseState::Phase::Live && !client_->closing) {
      auto quick = Context::with_timeout(milliseconds(20));
      static_cast<void>(client_->leases->end(lease_, quick));
    }
    if (client_->open.cancelled()) return closed_error();
    error.outcome = Outcome::NotApplied;
    return error;
  }

  Error not_acquired(const Context& ctx) const {
    auto waited = std::chrono::duration_cast<milliseconds>(steady_clock::now() - began_);
    auto time = std::to_string(waited.count()) + " ms";
    return context_error(ctx, name() + " was not acquired within " + time, cause_);
  }

  /// Reads the keys that may be before ours: of those with a lower create revision as many as the
  /// rule needs (and `own`), the latest first. A shared holder among shared ones needs none of
  /// them.
  Op read_earlier(std::int64_t most_revision, int own) const {
    bool shared = rule_.kind == QueueRule::Kind::Shared;
    auto range = request_under<RangeRequest>(prefix_);
    range.sort_order = SortOrder::Descend;
    range.sort_target = SortTarget::Create;
    range.max_create_revision = most_revision;
    range.keys_only = rule_.kind == QueueRule::Kind::Exclusive;
    if (!crowded_) range.limit = (shared ? kFewShared : rule_.permits) + own;
    if (!shared) return Op::range(std::move(range));
    Txn unless_all_shared;
    for (auto [is, bound] : {std::make_pair(Compare::Is::Greater, kBelowShared),
                             std::make_pair(Compare::Is::Less, kAboveShared)}) {
      auto compare = Compare::value(prefix_, is, bound);
      compare.range_end = range.range_end;
      unless_all_shared.when(std::move(compare));
    }
    return Op::txn(std::move(unless_all_shared.otherwise(Op::range(std::move(range)))));
  }

  /// True if what was not read may decide: then all must be. There may be keys of another queue
  /// between, or only shared ones before an exclusive one.
  bool hidden(const std::vector<KeyValue>& keys) {
    bool foreign = std::any_of(keys.begin(), keys.end(), [&](const KeyValue& kv) {
      return of_another_queue(kv.key, prefix_);
    });
    bool shared = rule_.kind == QueueRule::Kind::Shared &&
                  keys.size() >= static_cast<std::size_t>(kFewShared) &&
                  std::all_of(keys.begin(), keys.end(),
                              [](const KeyValue& kv) { return is_shared(kv.value); });
    return (foreign || shared) && !std::exchange(crowded_, true);
  }

  /// The second answer of `done` is that of read_earlier(), the third the oldest key.
  Result<Turn> judge(const TxnResponse& done, const Context& ctx) {
    looked_at_ = done.revision;
    blame(done.range(2).kvs);
    auto* nested = std::get_if<std::shared_ptr<const TxnResponse>>(&done.responses[1]);
    auto& keys = (nested ? (**nested).range(0) : done.range(1)).kvs;
    return hidden(keys) ? look(ctx) : judge(keys);
  }

  Result<Turn> judge(const std::vector<KeyValue>& keys) const {
    std::vector<std::string> blockers;
    for (const KeyValue& kv : keys) {
      bool earlier = kv.key != key_ && kv.create_revision < token_;
      if (!earlier || of_another_queue(kv.key, prefix_)) continue;
      if (rule_.kind == QueueRule::Kind::Shared && is_shared(kv.value)) continue;
      if (rule_.kind == QueueRule::Kind::Permits) {
        auto theirs = std::strtoll(kv.value.c_str(), nullptr, 10);
        if (theirs > 0 && theirs != rule_.permits) {
          return make_error(ErrorCode::Conflict,
                            name() + " has " + std::to_string(rule_.permits) + " permits here",
                            kv.key + " says " + std::to_string(theirs));
        }
      }
      blockers.push_back(kv.key);
      if (static_cast<std::int64_t>(blockers.size()) < rule_.permits) continue;
      return Turn{Place::Behind, std::move(blockers)};
    }
    return Turn{Place::Head, {}};
  }

  /// Remembers who holds it, for errors.
  void blame(const std::vector<KeyValue>& oldest) {
    cause_ = "somebody else holds it";
    for (const KeyValue& kv : oldest) {
      if (kv.key == key_ || of_another_queue(kv.key, prefix_)) continue;
      bool ours = client_->leases->keeps(kv.lease);
      cause_ = kv.key + (ours ? " holds it, by this Coordinator" : " holds it");
      return;
    }
  }

  /// A put that was sent twice may arrive once more after the key was deleted: its lease must go,
  /// so that it cannot make a key that is nobody's.
  template <class Judge>
  Result<Turn> put_key(const Txn& txn, const Context& ctx, Judge&& judge) {
    bool repeated = false;
    auto done = client_->commit(txn, Safety::Idempotent, ctx, &repeated);
    if (repeated) lease_->tainted = true;
    if (!done && done.error().code == ErrorCode::NotFound) return Turn{};  // the lease is gone
    if (!done) return done.error();
    if (done->succeeded) token_ = done->revision;
    return judge(*done);
  }

  /// What an earlier attempt has put; nothing if it has gone.
  Result<Turn> look_for_own(const RangeResponse& own, const Context& ctx) {
    if (own.kvs.empty()) return Turn{};
    token_ = own.kvs.front().create_revision;
    return look(ctx);
  }

  /// The head of the queue if nobody is in it, which is the smaller request; else a place.
  Result<Turn> take_place(const Context& ctx) {
    if (rule_.kind != QueueRule::Kind::Exclusive || client_->contended) return enter(ctx);
    auto turn = enter_if_free(ctx);
    bool taken = turn && turn->place == Place::Behind && turn->blockers.empty();
    return taken ? enter(ctx) : turn;
  }

  /// Takes a place in the queue. May be repeated: the second time finds the key of the first.
  Result<Turn> enter(const Context& ctx) {
    Txn txn;
    txn.when(Compare::missing(key_))
        .then(Op::put(key_, value_, lease_->id))
        .then(read_earlier(0, 1))
        .then(Op::range(oldest_under(prefix_)))
        .otherwise(Op::get(key_));
    return put_key(txn, ctx, [&](const TxnResponse& done) {
      queued_ = true;
      return done.succeeded ? judge(done, ctx) : look_for_own(done.range(0), ctx);
    });
  }

  /// Takes the head of the queue if nobody is in it.
  Result<Turn> enter_if_free(const Context& ctx) {
    auto nobody = Compare::missing(prefix_);
    nobody.range_end = prefix_range_end(prefix_);
    Txn txn;
    txn.when(nobody).then(Op::put(key_, value_, lease_->id));
    txn.otherwise(Op::get(key_)).otherwise(Op::range(oldest_under(prefix_, 10)));
    return put_key(txn, ctx, [&](const TxnResponse& done) -> Result<Turn> {
      if (done.succeeded) return Turn{Place::Head, {}};
      auto& own = done.range(0);
      if (!own.kvs.empty()) return look_for_own(own, ctx);
      auto& seen = done.range(1).kvs;
      blame(seen);
      bool foreign = std::all_of(seen.begin(), seen.end(), [&](const KeyValue& kv) {
        return of_another_queue(kv.key, prefix_);
      });
      return foreign ? enter(ctx) : Turn{Place::Behind, {}};
    });
  }

  /// Where we stand now.
  Result<Turn> look(const Context& ctx) {
    Txn txn;
    txn.then(Op::get(key_)).then(read_earlier(token_ - 1, 0));
    txn.then(Op::range(oldest_under(prefix_)));
    auto done = client_->commit(txn, Safety::Read, ctx);
    if (!done) return done.error();
    auto& mine = done->range(0).kvs;
    if (mine.empty() || mine.front().create_revision != token_) return Turn{};
    return judge(*done, ctx);
  }

  Result<Turn> wait(const Turn& turn, const Context& ctx) {
    auto waiting = join_contexts({&ctx, &client_->open, &lease_->life});
    // Looks again now and then: the stream may be to a member that is frozen.
    auto patience = join_contexts({&waiting}, steady_clock::now() + kPatience);
    auto next = wait_on_stream(turn, patience);
    if (!next && !waiting.done()) {
      if (!patience.done()) pause(waiting, backoff_.next());
      next = look(waiting);
    } else {
      backoff_.reset();
    }
    if (lease_->life.cancelled() || !lease_->held()) return Turn{};
    if (next || waiting.done() || is_final(next.error())) return next;
    cause_ = to_string(next.error());
    return turn;
  }

  /// Those before us are watched twice: etcd takes the revision at which a watch begins a moment
  /// before it makes it, and one that a write has overtaken meanwhile is served by its timer of
  /// 100 ms. Hardly ever are both of two.
  std::string watch_body(const Turn& turn) const {
    WatchRequest watch;
    watch.no_put = true;
    bool one = turn.blockers.size() == 1;
    watch.key = one ? turn.blockers.front() : prefix_;
    if (!one) watch.range_end = prefix_range_end(prefix_);
    auto body = wire::watch_body(watch, 1, 0) + "\n" + wire::watch_body(watch, 2, 0) + "\n";
    if (!one) return body;
    watch.key = key_;
    return body + wire::watch_body(watch, 3, 0) + "\n";
  }

  /// Watches the keys before ours and our own, then looks, then waits for one of them to go. The
  /// stream is read by the caller's thread: a hand-over wakes nobody else.
  Result<Turn> wait_on_stream(const Turn& turn, const Context& ctx) {
    std::optional<Result<Turn>> seen;
    auto blockers = turn.blockers;
    const bool one = blockers.size() == 1;
    int unconfirmed = one ? 3 : 2;
    const auto looked_at = looked_at_;
    bool changed = false;  // something, or it may have before the watches stood
    auto concerns = [&](const WatchEvent& event) {
      return event.kv.key == key_ ||
             std::find(blockers.begin(), blockers.end(), event.kv.key) != blockers.end();
    };
    wire::Lines lines;
    ClientState::StreamPlace place;
    auto line = [&](std::string_view text) {
      auto watch = client_->read_line<wire::WatchLine>(place, text);
      if (watch && watch->canceled) client_->refused(place, {3, watch->cancel_reason});
      if (!watch || watch->canceled) return false;
      if (watch->created) --unconfirmed;
      changed = changed || (watch->created && watch->revision != looked_at) ||
                std::any_of(watch->events.begin(), watch->events.end(), concerns);
      if (!changed || unconfirmed > 0) return true;
      changed = false;
      seen = look(ctx);
      if (!*seen || (*seen)->place != Place::Behind) return false;
      blockers = (*seen)->blockers;
      return !one || blockers == turn.blockers;
    };
    auto sink = [&](std::string_view piece) { return lines.feed(piece, line); };
    auto end = client_->stream("/v3/watch", watch_body(turn), sink, ctx, &place);
    if (seen && !ctx.done()) return *seen;
    if (!end) return end.error();
    return make_error(ErrorCode::Unavailable, "the watch of a lock has ended");
  }

  const std::shared_ptr<ClientState> client_;
  const std::string prefix_;
  const QueueRule rule_;
  const std::string value_;
  const milliseconds ttl_;
  const SteadyTime began_{steady_clock::now()};
  LeasePtr lease_;
  std::string key_;
  std::int64_t token_{0};
  std::int64_t looked_at_{0};  // the revision of what is known
  bool queued_{false};         // the key was put even if others were before us
  bool crowded_{false};        // there are keys of other queues between ours
  std::string cause_;          // what it waits for
  Backoff backoff_{milliseconds(20), milliseconds(1000)};
};

/// The validated arguments of every way to get a lock or an office.
COORDINATION_API Result<Contender> contender(const CoordinatorState& state, const char* service,
                                             const std::string& key, milliseconds ttl,
                                             QueueRule rule, std::string value) {
  auto valid = validate_key(key, "key");
  if (valid) valid = validate_ttl(ttl);
  if (!valid) return valid.error();
  if (rule.permits <= 0) return invalid("a semaphore needs at least one permit");
  return Contender(state.client, state.path(service, key) + "/", rule, std::move(value), ttl);
}

COORDINATION_API Result<Lock> get_lock(const CoordinatorState& state, const std::string& key,
                                       milliseconds ttl, QueueRule rule, bool only_try,
                                       const Context& ctx) {
  bool permits = rule.kind == QueueRule::Kind::Permits;
  auto value = state.client->options.holder;
  if (permits) value = std::to_string(rule.permits) + " " + value;
  if (rule.kind == QueueRule::Kind::Shared) value = std::string(kShared) + " " + value;
  auto* service = permits ? "/semaphores/" : "/locks/";
  auto contender = detail::contender(state, service, key, ttl, rule, std::move(value));
  if (!contender) return contender.error();
  auto owned = only_try ? contender->try_acquire(ctx) : contender->acquire(ctx);
  if (!owned) return owned.error();
  return Lock(std::move(*owned));
}

/// Who is first in a queue.
COORDINATION_API Result<LockHolder> first_of(const CoordinatorState& state, const char* service,
                                             const std::string& key, const Context& given) {
  auto valid = validate_key(key, "key");
  if (!valid) return valid.error();
  auto ctx = state.client->bounded(given);
  auto range = oldest_under(state.path(service, key) + "/");
  auto foreign = [&](const KeyValue& kv) { return of_another_queue(kv.key, range.key); };
  auto found = state.client->read(range, ctx);
  if (found && !found->kvs.empty() && foreign(found->kvs.front())) {
    range.limit = 0;
    found = state.client->read(range, ctx);
  }
  if (!found) return found.error();
  auto first = std::find_if_not(found->kvs.begin(), found->kvs.end(), foreign);
  if (first == found->kvs.end()) {
    return make_error(ErrorCode::NotFound, "nobody is in the queue of " + range.key);
  }
  return LockHolder{first->key, first->value, first->create_revision, found->revision};
}

inline constexpr QueueRule kExclusive{QueueRule::Kind::Exclusive, 1};
inline constexpr QueueRule kSharedRule{QueueRule::Kind::Shared, 1};

}  // namespace detail

COORDINATION_API Result<Lock> DistributedLock::acquire(std::string key, milliseconds ttl,
                                                       Context ctx) {
  return detail::get_lock(*state_, key, ttl, detail::kExclusive, false, ctx);
}
COORDINATION_API Result<Lock> DistributedLock::try_acquire(std::string key, milliseconds ttl,
                                                           Context ctx) {
  return detail::get_lock(*state_, key, ttl, detail::kExclusive, true, ctx);
}
COORDINATION_API Result<Lock> DistributedLock::acquire_shared(std::string key, milliseconds ttl,
                                                              Context ctx) {
  return detail::get_lock(*state_, key, ttl, detail::kSharedRule, false, ctx);
}
COORDINATION_API Result<Lock> DistributedLock::try_acquire_shared(std::string key, milliseconds ttl,
                                                                  Context ctx) {
  return detail::get_lock(*state_, key, ttl, detail::kSharedRule, true, ctx);
}
COORDINATION_API Result<LockHolder> DistributedLock::holder(std::string key, Context ctx) {
  return detail::first_of(*state_, "/locks/", key, ctx);
}

COORDINATION_API Semaphore DistributedLock::semaphore(std::string key, int permits) {
  return Semaphore(state_, std::move(key), permits);
}

COORDINATION_API Result<Lock> Semaphore::acquire(milliseconds ttl, Context ctx) {
  return detail::get_lock(*state_, key_, ttl, {detail::QueueRule::Kind::Permits, permits_}, false,
                          ctx);
}
COORDINATION_API Result<Lock> Semaphore::try_acquire(milliseconds ttl, Context ctx) {
  return detail::get_lock(*state_, key_, ttl, {detail::QueueRule::Kind::Permits, permits_}, true,
                          ctx);
}

COORDINATION_API void detail::let_go(const std::shared_ptr<OwnedKey>& owned) { owned->abandon(); }

COORDINATION_API const std::string& HeldKey::key() const { return state_->key; }
COORDINATION_API std::int64_t HeldKey::fencing_token() const { return state_->token; }
COORDINATION_API bool HeldKey::held() const { return state_->held(); }
COORDINATION_API void HeldKey::on_lost(std::function<void(const Error&)> handler) {
  state_->loss.add(std::move(handler));
}
COORDINATION_API Compare HeldKey::guard() const { return state_->ours; }

COORDINATION_API Result<PutResponse> HeldKey::put(std::string key, std::string value, Context ctx) {
  return state_->guarded_op<PutResponse>(Op::put(std::move(key), std::move(value)), ctx);
}

COORDINATION_API Result<RemoveResponse> HeldKey::remove(std::string key, Context ctx) {
  return state_->guarded_op<RemoveResponse>(Op::remove(std::move(key)), ctx);
}

COORDINATION_API Result<TxnResponse> HeldKey::commit(Txn txn, Context ctx) {
  auto valid = detail::validate_txn(txn);
  if (!valid) return valid.error();
  return state_->guarded_commit(std::move(txn), ctx, detail::Safety::Write);
}

COORDINATION_API Result<void> Lock::unlock(Context ctx) { return state_->release(ctx); }

COORDINATION_API Result<void> Lock::renew(milliseconds ttl, Context ctx) {
  auto valid = detail::validate_ttl(ttl);
  if (!valid) return valid;
  return state_->renew(ttl, ctx);
}

COORDINATION_API Result<milliseconds> Lock::ttl(Context ctx) {
  auto usable = state_->require_held();
  if (!usable) return usable.error();
  auto left = detail::remaining(*state_->present_lease(), ctx);
  if (!left && left.error().code == ErrorCode::Lost) return state_->lost_error();
  return left;
}

// == 9. Election ================================================================================

COORDINATION_API Result<void> Leadership::resign(Context ctx) { return state_->release(ctx); }

COORDINATION_API Result<std::int64_t> Leadership::proclaim(std::string value, Context ctx) {
  return detail::replace_value(*state_, value, ctx);
}

COORDINATION_API Result<Leadership> Election::campaign(std::string name, std::string value,
                                                       milliseconds ttl, Context ctx) {
  auto contender =
      detail::contender(*state_, "/elections/", name, ttl, detail::kExclusive, std::move(value));
  if (!contender) return contender.error();
  auto owned = contender->acquire(ctx);
  if (!owned) return owned.error();
  return Leadership(std::move(*owned));
}

COORDINATION_API Result<LeaderInfo> Election::leader(std::string name, Context ctx) {
  return detail::first_of(*state_, "/elections/", name, ctx);
}

namespace detail {

/// Follows the candidates and tells when the first of them is another or says something else.
class LeaderTracker {
 public:
  explicit LeaderTracker(std::string prefix) : prefix_(std::move(prefix)) {}

  std::optional<LeaderInfo> operator()(WatchEvent event) {
    if (of_another_queue(event.kv.key, prefix_)) return std::nullopt;
    if (event.type == EventType::Delete) {
      candidates_.erase(event.kv.key);
    } else {
      candidates_[event.kv.key] = event.kv;
    }
    LeaderInfo now;
    for (auto& candidate : candidates_) {
      auto& kv = candidate.second;
      if (now.exists() && now.token <= kv.create_revision) continue;
      now = {kv.key, kv.value, kv.create_revision, 0};
    }
    bool same = last_ && std::tie(now.key, now.value, now.token) ==
                             std::tie(last_->key, last_->value, last_->token);
    if (same) return std::nullopt;
    now.revision = event.revision;
    return last_ = now;
  }

 private:
  std::string prefix_;
  std::map<std::string, KeyValue> candidates_;
  std::optional<LeaderInfo> last_;
};

COORDINATION_API Result<WatchPlan<LeaderInfo>> observe_plan(const CoordinatorState& state,
                                                            const std::string& name) {
  auto valid = validate_key(name, "name");
  if (!valid) return valid.error();
  WatchPlan<LeaderInfo> plan;
  plan.client = state.client;
  plan.request = request_under<WatchRequest>(state.path("/elections/", name) + "/");
  plan.mode = RangeFeed::Mode::ByAge;
  plan.include_existing = true;
  plan.decode = LeaderTracker(plan.request.key);
  return plan;
}

}  // namespace detail

COORDINATION_API Result<Watch<LeaderInfo>> Election::observe(std::string name, Context ctx) {
  return detail::open_watch(detail::observe_plan(*state_, name), ctx);
}

COORDINATION_API Result<Subscription> Election::observe(
    std::string name, std::function<void(const LeaderInfo&)> handler, Context ctx) {
  return detail::subscribe(detail::observe_plan(*state_, name), std::move(handler), ctx);
}

// == 10. Registry ===============================================================================

COORDINATION_API bool operator==(const ServiceInfo& a, const ServiceInfo& b) {
  return std::tie(a.id, a.name, a.address, a.port, a.metadata, a.ttl) ==
         std::tie(b.id, b.name, b.address, b.port, b.metadata, b.ttl);
}
COORDINATION_API bool operator!=(const ServiceInfo& a, const ServiceInfo& b) { return !(a == b); }

COORDINATION_API const char* to_string(RegistrationEvent event) {
  switch (event) {
    case RegistrationEvent::Registered: return "REGISTERED";
    case RegistrationEvent::Lost: return "LOST";
    case RegistrationEvent::Replaced: break;
  }
  return "REPLACED";
}

namespace detail {

COORDINATION_API Result<void> validate_segment(const std::string& text, const char* what) {
  if (text.empty()) return invalid(std::string("the service's ") + what + " is empty");
  if (text.find('/') != std::string::npos || text == "." || text == "..") {
    return invalid(std::string("the service's ") + what + " \"" + text + "\" is no single segment");
  }
  return {};
}

COORDINATION_API Result<void> validate_service(const ServiceInfo& service) {
  auto valid = validate_segment(service.id, "id");
  if (valid) valid = validate_segment(service.name, "name");
  if (!valid) return valid;
  if (service.address.empty()) return invalid("the service's address is empty");
  if (service.port < 1 || service.port > 65535) {
    return invalid("the service's port " + std::to_string(service.port) + " is not in 1-65535");
  }
  auto valid_ttl = validate_ttl(service.ttl);
  if (!valid_ttl) return valid_ttl;
  if (wire::decode_service(wire::encode_service(service)) == service) return {};
  return invalid("a text of the service " + service.name + "/" + service.id + " is not UTF-8");
}

COORDINATION_API Error not_registered(const std::string& id) {
  return make_error(ErrorCode::NotFound, "no service with the id " + id + " is registered here");
}

/// The intent that a record be there. Every write is a compare-and-set on what was seen last: so
/// what arrives late changes nothing, and what is another's is only taken by who registers.
///
/// Watch and leases only give hints that something has changed; what has is found out in turn.
class RegistrationState : public HubSink, public std::enable_shared_from_this<RegistrationState> {
 public:
  const bool of_handle;  // and of nobody else's: two handles replace each other as strangers do

  RegistrationState(std::shared_ptr<ClientState> client, std::string key, std::string id,
                    bool for_handle = true)
      : of_handle(for_handle), client_(std::move(client)), key_(std::move(key)), id_(std::move(id)),
        strand_(std::make_shared<Strand>(client_->executor, client_->executor->callbacks,
                                         client_->log, "on_event of " + key_)) {}

  /// Makes the record, whoever's is there, or replaces it in one step; its revision. 0: this
  /// registration had ended before.
  Result<std::int64_t> make(const ServiceInfo& service, const RegisterOptions& options,
                            const Context& ctx) {
    return in_turn(ctx, [&]() -> Result<std::int64_t> {
      if (ended_) return 0;
      auto written = write(service, {true, true}, written_, ctx);
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!written && !told_) ended_ = true;  // it never came to be
        if (!written) return written.error();
        service_ = service;
        options_ = options;
      }
      become(Event::Registered, true);
      return written->revision;
    });
  }

  /// Replaces the metadata while the record is ours; its revision.
  Result<std::int64_t> update(const std::map<std::string, std::string>& metadata,
                              const Context& ctx) {
    return in_turn(ctx, [&]() -> Result<std::int64_t> {
      bool may = is(Event::Registered) || (is(Event::Lost) && restores());
      if (ended_ || !may) return not_registered(id_);
      auto service = service_;
      service.metadata = metadata;
      auto valid = validate_service(service);
      if (!valid) return valid.error();
      auto written = write(service, {false, restores()}, written_, ctx);
      if (!written) return written.error();
      if (written->whose != Whose::Ours) return not_registered(id_);
      {
        std::lock_guard<std::mutex> lock(mutex_);
        service_.metadata = metadata;
      }
      become(Event::Registered);
      return written->revision;
    });
  }

  /// Ends the intent, and the record if it is ours; the revision.
  Result<std::int64_t> end(const Context& ctx) {
    ended_ = true;
    strand_->close();
    client_->watches->remove(hub_id_);
    return in_turn(ctx, [&]() -> Result<std::int64_t> {
      for (auto expected = written_.load();;) {
        auto found = swap(expected, Op::remove(key_), ctx);
        if (!found) return found.error();
        if (found->swapped || found->whose != Whose::Ours) return looked_at_.load();
        expected = found->revision;
      }
    });
  }

  /// True once it was ended, or never came to be.
  bool ended() const { return ended_; }
  const std::string& id() const { return id_; }
  const std::shared_ptr<ClientState>& client() const { return client_; }

  /// What a handle's destructor does.
  void abandon() {
    if (!ended_) within_patience(*client_, [this](const Context& ctx) { return end(ctx); });
    strand_->close();
  }

  // HubSink.

  bool deliver(std::vector<WatchEvent> events) override {
    for (auto& event : events) {
      bool put = event.type == EventType::Put;
      bool old = put && (is_ours(event.kv.lease) || is(Event::Replaced));
      if (event.revision > written_ && !old) check_later(milliseconds(0));
    }
    return true;
  }
  void cut_off(std::int64_t, bool) override {
    hub_id_ = 0;
    check_later(milliseconds(0));
  }

 private:
  using Event = RegistrationEvent;
  static constexpr std::size_t kMostIds = 16;

  enum class Whose { Ours, Nobodys, Anothers };
  /// What is in the place of the record.
  struct Found {
    Whose whose{Whose::Nobodys};
    bool swapped{false};
    std::int64_t revision{0};  // of the last change
    std::int64_t lease{0};
  };
  /// What write() may do beside replacing what is ours.
  struct Rights {
    bool take;    // what is another's
    bool create;  // where nothing is
  };

  /// One at a time; what was ended meanwhile goes.
  template <class Fn>
  auto in_turn(const Context& ctx, Fn&& fn) -> decltype(fn()) {
    if (!turnstile_.enter(ctx)) {
      return context_error(ctx, key_ + " is being changed by another call", "",
                           ended_ ? Outcome::MaybeApplied : Outcome::NotApplied);
    }
    auto done = fn();
    if (ended_) drop_leases();
    turnstile_.leave();
    return done;
  }

  bool is_ours(std::int64_t lease) {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::find(ids_.begin(), ids_.end(), lease) != ids_.end();
  }
  bool restores() {
    std::lock_guard<std::mutex> lock(mutex_);
    return options_.heal == HealPolicy::Restore;
  }
  bool is(Event event) {
    std::lock_guard<std::mutex> lock(mutex_);
    return told_ == event;
  }
  /// Whether this is the lease of a record that stays.
  bool hangs_on(std::int64_t id) {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::any_of(leases_.begin(), leases_.end(),
                       [id](const LeasePtr& lease) { return lease->id == id && lease->held(); });
  }
  void drop_leases() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& lease : std::exchange(leases_, {})) client_->leases->drop(lease);
  }

  /// Does it if the record is as it was at `expected` (0: there is none); else says what is there.
  Result<Found> swap(std::int64_t expected, const Op& op, const Context& ctx) {
    Txn txn;
    txn.when(Compare::mod_revision(key_, Compare::Is::Equal, expected));
    txn.then(op).otherwise(Op::get(key_));
    auto done = client_->commit(txn, Safety::Idempotent, ctx);
    if (!done) return done.error();
    looked_at_ = done->revision;
    if (done->succeeded) return Found{Whose::Ours, true, done->revision};
    auto& kvs = done->range(0).kvs;
    if (kvs.empty()) return Found{};
    auto& kv = kvs.front();
    auto whose = is_ours(kv.lease) ? Whose::Ours : Whose::Anothers;
    return Found{whose, false, kv.mod_revision, kv.lease};
  }

  Result<Found> put(const std::string& record, const LeasePtr& lease, Rights rights,
                    std::int64_t expected, const Context& ctx) {
    while (true) {
      auto found = swap(expected, Op::put(key_, record, lease->id), ctx);
      if (!found || found->swapped) return found;
      bool may = found->whose == Whose::Ours || rights.take ||
                 (found->whose == Whose::Nobodys && rights.create);
      if (!may) return found;
      expected = found->revision;
    }
  }

  /// Puts the record under a lease of ours, most likely over what is there since `expected`; the
  /// leases under which it was go.
  Result<Found> write(const ServiceInfo& service, Rights rights, std::int64_t expected,
                      const Context& ctx) {
    auto record = wire::encode_service(service);
    while (true) {
      bool fresh = false;
      auto lease = lease_for(service, ctx, &fresh);
      if (!lease) return lease.error();
      auto done = put(record, *lease, rights, expected, ctx);
      bool written = done && done->whose == Whose::Ours;
      // Where nobody knows whether it has moved, all leases are kept alive.
      bool unknown = !done && done.error().outcome == Outcome::MaybeApplied;
      if (written) written_ = done->revision;
      if (written || (fresh && !unknown)) settle(*lease, written);
      bool died = !done && done.error().code == ErrorCode::NotFound;
      if (!died || fresh) return done;
      client_->leases->drop(*lease);  // the next one is new
      check_later(milliseconds(0));
    }
  }

  /// The lease of the record, if it does; else a new one.
  Result<LeasePtr> lease_for(const ServiceInfo& service, const Context& ctx, bool* fresh) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      bool one = leases_.size() == 1 && leases_.front()->held();
      if (one && leases_.front()->asked == service.ttl) return leases_.front();
    }
    *fresh = true;
    auto lease = client_->leases->grant(service.ttl, ctx);
    if (!lease) return lease;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      leases_.push_back(*lease);
      ids_.push_back((*lease)->id);
      if (ids_.size() > kMostIds) ids_.erase(ids_.begin());
    }
    (*lease)->set_hook([weak = weak_from_this(), id = (*lease)->id](const Error&) {
      auto self = weak.lock();
      if (!self || self->ended_) return;
      self->become(Event::Lost, false, id);
      self->check_later(milliseconds(0));
    });
    return lease;
  }

  /// The record hangs on this lease and on no other, or certainly not on this one: the rest goes.
  void settle(const LeasePtr& lease, bool written) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (auto& each : std::exchange(leases_, {})) {
      bool stays = (each == lease) == written;
      stays ? leases_.push_back(each) : client_->leases->drop(each);
    }
    lock.unlock();
    if (written) follow();
  }

  void follow() {
    if (hub_id_ != 0 || ended_) return;
    WatchRequest request;
    request.key = key_;
    hub_id_ = client_->watches->add(std::move(request), looked_at_ + 1, true, weak_from_this());
    if (ended_) client_->watches->remove(hub_id_);
  }

  /// Tells how the record stands, if it stood otherwise or `again`; not if it has left this lease.
  void become(Event event, bool again = false, std::int64_t with = 0) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto hangs = [&](const LeasePtr& lease) { return lease->id == with; };
      if (with != 0 && std::none_of(leases_.begin(), leases_.end(), hangs)) return;
      // What is another's, or was never ours, cannot be lost.
      bool possible = event != Event::Lost || told_ == Event::Registered;
      if (ended_ || !possible || (told_ == event && !again)) return;
      told_ = event;
      (*client_->log)(LogLevel::Info, "registration", {{"key", key_}, {"event", to_string(event)}});
      if (options_.on_event) {
        strand_->post(
            [handler = options_.on_event, event, service = service_] { handler(event, service); });
      }
    }
    bool over = event == Event::Replaced || (event == Event::Lost && !restores());
    if (over) drop_leases();
  }

  void check_later(milliseconds delay) {
    if (ended_ || checking_.exchange(true)) return;
    auto& executor = *client_->executor;
    executor.run_at(steady_clock::now() + delay, executor.background, [weak = weak_from_this()] {
      if (auto self = weak.lock()) self->check();
    });
  }

  void check() {
    checking_ = false;
    if (ended_ || client_->closing) return;
    auto ctx = Context::with_timeout(milliseconds(5000));
    auto now = Context::with_timeout(milliseconds(0));
    auto done = in_turn(now, [&] { return check_in_turn(ctx); });
    if (done) return backoff_.reset();
    (*client_->log)(LogLevel::Warn, "a registration was not checked",
                    {{"key", key_}, {"cause", to_string(done.error())}});
    check_later(backoff_.next());
  }

  /// How does the record stand? It is put back where it is missing and wanted.
  Result<bool> check_in_turn(const Context& ctx) {
    auto found = swap(-1, Op::get(key_), ctx);
    if (!found) return found.error();
    follow();
    if (found->whose == Whose::Anothers) return become(Event::Replaced), true;
    if (hangs_on(found->lease)) return become(Event::Registered), true;
    become(Event::Lost);
    if (!restores()) return true;
    auto written = write(service_, {false, true}, found->revision, ctx);
    if (!written) return written.error();
    return become(written->whose == Whose::Ours ? Event::Registered : Event::Replaced), true;
  }

  const std::shared_ptr<ClientState> client_;
  const std::string key_, id_;
  std::shared_ptr<Strand> strand_;
  Turnstile turnstile_;
  std::atomic<bool> ended_{false};
  std::atomic<bool> checking_{false};       // check() will come
  std::atomic<std::int64_t> written_{0};    // the revision of our last put, as far as we know
  std::atomic<std::int64_t> looked_at_{0};  // the revision of what is known
  std::atomic<std::int64_t> hub_id_{0};     // 0: nothing is watched
  std::mutex mutex_;
  // The mutex guards these; the first two are changed only in turn:
  ServiceInfo service_;
  RegisterOptions options_;
  std::optional<Event> told_;      // the last; none: it has not come to be yet
  std::vector<LeasePtr> leases_;   // the record hangs on one of them, most likely the first
  std::vector<std::int64_t> ids_;  // of leases on which we may ever have put it
  Backoff backoff_{milliseconds(100), milliseconds(1000)};
};

using RegistrationPtr = std::shared_ptr<RegistrationState>;

struct RegistryState {
  std::mutex mutex;
  std::multimap<std::string, RegistrationPtr> by_key;

  /// The one for this key; a new one where there is none that lives, and for a handle.
  RegistrationPtr get(const std::shared_ptr<ClientState>& client, const std::string& key,
                      const std::string& id, bool for_handle) {
    auto usable = [for_handle](const auto& entry) {
      return !for_handle && !entry.second->of_handle && !entry.second->ended();
    };
    std::lock_guard<std::mutex> lock(mutex);
    if (for_handle) forget_ended();
    auto [first, last] = by_key.equal_range(key);
    auto found = std::find_if(first, last, usable);
    if (found != last) return found->second;
    auto made = std::make_shared<RegistrationState>(client, key, id, for_handle);
    return by_key.emplace(key, std::move(made))->second;
  }

  std::vector<RegistrationPtr> find(const std::string& id) {
    std::vector<RegistrationPtr> found;
    std::lock_guard<std::mutex> lock(mutex);
    forget_ended();
    for (auto& entry : by_key) {
      if (entry.second->id() == id) found.push_back(entry.second);
    }
    return found;
  }

 private:
  void forget_ended() {
    for (auto it = by_key.begin(); it != by_key.end();) {
      it = it->second->ended() ? by_key.erase(it) : std::next(it);
    }
  }
};

COORDINATION_API std::optional<ServiceInfo> read_service(const KeyValue& kv, const Log& log) {
  auto service = wire::decode_service(kv.value);
  if (!service) log(LogLevel::Warn, "a service record cannot be read", {{"key", kv.key}});
  return service;
}

/// A record that cannot be read is none: when one turns into that, the last good one has gone.
COORDINATION_API std::optional<ServiceEvent> service_event(const WatchEvent& event,
                                                           const Log& log) {
  bool there = event.type == EventType::Put;
  auto service = there ? read_service(event.kv, log) : std::nullopt;
  ServiceEvent result;
  result.type = service ? EventType::Put : EventType::Delete;
  if (!service && event.prev_kv) service = wire::decode_service(event.prev_kv->value);
  if (!service) return std::nullopt;
  result.service = std::move(*service);
  result.revision = event.revision;
  result.timestamp = std::chrono::system_clock::now();
  return result;
}

COORDINATION_API Result<WatchPlan<ServiceEvent>> services_plan(const CoordinatorState& state,
                                                               const std::string& name,
                                                               const WatchOptions& options) {
  auto valid = validate_segment(name, "name");
  if (!valid) return valid.error();
  WatchPlan<ServiceEvent> plan;
  plan.client = state.client;
  plan.request = request_under<WatchRequest>(state.path("/services/", name) + "/");
  plan.request.queue_size = options.queue_size;
  plan.mode = RangeFeed::Mode::LiveWithValues;
  plan.include_existing = options.include_existing;
  plan.decode = [log = state.client->log](const WatchEvent& event) {
    return service_event(event, *log);
  };
  return plan;
}

/// A live range without a queue: what is there now, and a handler that hears of changes.
struct ViewCore : EventPort, std::enable_shared_from_this<ViewCore> {
  ViewCore(const std::shared_ptr<ClientState>& c, const WatchRequest& request)
      : EventPort(c, "a view of " + request.key),
        feed(std::make_shared<RangeFeed>(c, request, RangeFeed::Mode::LiveWithValues)) {
    call_handlers();
    changes.emplace(strand);
  }

  bool push(WatchEvent event) override {
    stale = true;
    if (!shows || shows(event.kv.key)) changes->fire();
    return true;
  }
  void moved(std::int64_t revision) override {
    std::lock_guard<std::mutex> lock(gate.mutex);
    shown = revision;
    gate.changed.notify_all();
  }
  bool ready() override { return true; }

  /// What is not shown: it is not there, or nobody can tell any more.
  Error missing(std::string text) {
    std::lock_guard<std::mutex> lock(gate.mutex);
    return end ? *end : make_error(ErrorCode::NotFound, std::move(text));
  }
  Result<void> wait_for(std::int64_t revision, const Context& ctx) {
    auto limited = client->bounded(ctx);
    auto both = join_contexts({&limited, &client->open});
    gate.wait(both, [&] { return shown >= revision || end; });
    std::lock_guard<std::mutex> lock(gate.mutex);
    if (shown >= revision) return {};
    if (end) return *end;
    if (client->open.cancelled()) return closed_error();
    return context_error(ctx, "the view does not show this revision");
  }
  void close() {
    feed->stop();
    ended->close();  // and the strand
    changes->close();
  }

  std::shared_ptr<RangeFeed> feed;
  std::optional<ChangeSignal> changes;
  std::int64_t shown{0};  // the revision that it stands for
  std::string prefix{};   // of the keys, taken off before they are shown
  std::function<bool(const std::string&)> shows{};
  std::atomic<std::uint64_t> turn{0};  // of the round robin
  std::mutex decoding;                 // taken before the feed's; guards `decoded` and `resting`
  bool stale{true};                    // `decoded` is; the feed's mutex guards it
  std::shared_ptr<const std::vector<ServiceInfo>> decoded{};
  std::map<std::string, SteadyTime> resting{};  // instances that have failed, and until when
};

template <class View>
Result<View> open_view(const CoordinatorState& state, WatchRequest request, std::string prefix,
                       std::function<bool(const std::string&)> shows, const Context& ctx) {
  auto core = std::make_shared<ViewCore>(state.client, std::move(request));
  core->prefix = std::move(prefix);
  core->shows = std::move(shows);
  auto started = core->feed->start(core, false, ctx);
  if (!started) return started.error();
  return View(std::move(core));
}

/// The records of a view, decoded once per change.
COORDINATION_API std::shared_ptr<const std::vector<ServiceInfo>> decoded_services(ViewCore& view) {
  std::lock_guard<std::mutex> lock(view.decoding);
  return view.feed->look([&](const RangeFeed::Known& known, std::int64_t) {
    if (!std::exchange(view.stale, false)) return view.decoded;
    auto services = std::make_shared<std::vector<ServiceInfo>>();
    for (auto& entry : known) {
      auto service = wire::decode_service(entry.second.value);
      if (service) services->push_back(std::move(*service));
    }
    return view.decoded = std::move(services);
  });
}

/// The registration, and the revision.
COORDINATION_API Result<std::pair<RegistrationPtr, std::int64_t>> register_record(
    const CoordinatorState& state, const ServiceInfo& service, const RegisterOptions& options,
    bool for_handle, const Context& given) {
  auto valid = validate_service(service);
  if (!valid) return valid.error();
  auto ctx = state.client->bounded(given);
  auto key = state.path("/services/", service.name) + "/" + service.id;
  while (!state.client->closing) {
    auto registration = state.registry->get(state.client, key, service.id, for_handle);
    auto revision = registration->make(service, options, ctx);
    if (!revision) return revision.error();
    if (*revision > 0) return std::make_pair(std::move(registration), *revision);
  }
  return closed_error();
}

/// Of all registrations with this id: the last revision, or the last error.
template <class Fn>
Result<std::int64_t> for_each_registration(const CoordinatorState& state, const std::string& id,
                                           Fn&& fn) {
  auto valid = validate_segment(id, "id");
  if (!valid) return valid.error();
  if (state.client->closing) return closed_error();
  Result<std::int64_t> last = not_registered(id);
  for (auto& registration : state.registry->find(id)) {
    auto done = fn(*registration);
    bool better = done || done.error().code != ErrorCode::NotFound;
    if (better) last = std::move(done);
  }
  return last;
}

}  // namespace detail

COORDINATION_API Result<std::int64_t> ServiceRegistry::register_service(ServiceInfo service,
                                                                        RegisterOptions options,
                                                                        Context ctx) {
  auto made = detail::register_record(*state_, service, options, false, ctx);
  if (!made) return made.error();
  return made->second;
}

COORDINATION_API Result<Registration> ServiceRegistry::register_scoped(ServiceInfo service,
                                                                       RegisterOptions options,
                                                                       Context ctx) {
  auto made = detail::register_record(*state_, service, options, true, ctx);
  if (!made) return made.error();
  return Registration(std::move(made->first));
}

COORDINATION_API Result<std::int64_t> ServiceRegistry::update(
    std::string id, std::map<std::string, std::string> metadata, Context ctx) {
  ctx = state_->client->bounded(ctx);
  return detail::for_each_registration(*state_, id, [&](detail::RegistrationState& registration) {
    return registration.update(metadata, ctx);
  });
}

COORDINATION_API Result<std::int64_t> ServiceRegistry::unregister(std::string id, Context ctx) {
  ctx = state_->client->bounded(ctx);
  return detail::for_each_registration(
      *state_, id, [&](detail::RegistrationState& registration) { return registration.end(ctx); });
}

COORDINATION_API void detail::let_go(const std::shared_ptr<RegistrationState>& registration) {
  registration->abandon();
}

COORDINATION_API Result<std::int64_t> Registration::update(
    std::map<std::string, std::string> metadata, Context ctx) {
  if (state_->client()->closing) return detail::closed_error();
  return state_->update(metadata, state_->client()->bounded(ctx));
}

COORDINATION_API Result<std::int64_t> Registration::unregister(Context ctx) {
  if (state_->client()->closing) return detail::closed_error();
  if (state_->ended()) return detail::not_registered(state_->id());
  return state_->end(state_->client()->bounded(ctx));
}

COORDINATION_API Result<std::vector<ServiceInfo>> ServiceRegistry::discover(std::string name,
                                                                            Context ctx) {
  auto valid = detail::validate_segment(name, "name");
  if (!valid) return valid.error();
  auto range = detail::request_under<RangeRequest>(state_->path("/services/", name) + "/");
  auto all = detail::read_range(*state_->client, range, state_->client->bounded(ctx));
  if (!all) return all.error();
  std::vector<ServiceInfo> services;
  for (auto& kv : all->first) {
    auto service = detail::read_service(kv, *state_->client->log);
    if (service) services.push_back(std::move(*service));
  }
  return services;
}

COORDINATION_API Result<Watch<ServiceEvent>> ServiceRegistry::watch(std::string name,
                                                                    WatchOptions options,
                                                                    Context ctx) {
  return detail::open_watch(detail::services_plan(*state_, name, options), ctx);
}

COORDINATION_API Result<Subscription> ServiceRegistry::watch(
    std::string name, std::function<void(const ServiceEvent&)> handler, WatchOptions options,
    Context ctx) {
  return detail::subscribe(detail::services_plan(*state_, name, options), std::move(handler), ctx);
}

COORDINATION_API Result<ServiceView> ServiceRegistry::view(std::string name, Context ctx) {
  auto valid = detail::validate_segment(name, "name");
  if (!valid) return valid.error();
  auto prefix = state_->path("/services/", name) + "/";
  auto request = detail::request_under<WatchRequest>(prefix);
  return detail::open_view<ServiceView>(*state_, std::move(request), prefix, nullptr, ctx);
}

COORDINATION_API void detail::let_go(const std::shared_ptr<ViewCore>& view) { view->close(); }

COORDINATION_API std::vector<ServiceInfo> ServiceView::instances() const {
  return *detail::decoded_services(*core_);
}

COORDINATION_API Result<void> LiveView::wait_for(std::int64_t revision, Context ctx) const {
  return core_->wait_for(revision, ctx);
}

COORDINATION_API std::int64_t LiveView::revision() const {
  return core_->feed->look([](const auto&, std::int64_t revision) { return revision; });
}
COORDINATION_API bool LiveView::connected() const { return core_->feed->connected(); }
COORDINATION_API milliseconds LiveView::age() const { return core_->feed->age(); }
COORDINATION_API void LiveView::on_end(std::function<void(const Error&)> handler) {
  core_->ended->add(std::move(handler));
}
COORDINATION_API void LiveView::on_change(std::function<void()> handler) {
  core_->changes->add(std::move(handler));
}

// == 11. Config =================================================================================

namespace detail {

COORDINATION_API Error conversion_error(const std::string& key, std::string wanted,
                                        const char* found) {
  return make_error(ErrorCode::Validation, "the value of " + key + " is not " + wanted,
                    std::string("it is a ") + found);
}

COORDINATION_API Result<std::string> config_bytes(const std::string& key,
                                                  const nlohmann::json& value) {
  auto valid = validate_key(key, "key");
  if (!valid) return valid.error();
  auto bytes = wire::encode_config(value);
  if (bytes) return std::move(*bytes);
  return invalid("the value of " + key + " cannot be written as JSON");
}

/// `prefix` and what stands under it, as two ranges would be: one range, and a test. Or one key.
struct ConfigRange {
  std::string root;    // "<key_prefix>/config/"
  std::string prefix;  // as given; "" = all
  bool below{true};
  bool itself{true};  // with `prefix`, and so with the range that lies between
  std::string folder() const { return root + prefix + (prefix.empty() ? "" : "/"); }
  bool contains(const std::string& key) const {
    auto path = folder();
    return (itself && key == root + prefix) || (below && key.compare(0, path.size(), path) == 0);
  }
  template <class Request>
  Request request() const {
    Request request;
    request.key = itself ? root + prefix : folder();
    if (below) request.range_end = prefix_range_end(folder());
    return request;
  }
};

COORDINATION_API Result<ConfigRange> config_range(const CoordinatorState& state,
                                                  std::string prefix) {
  auto valid = prefix.empty() ? Result<void>() : validate_key(prefix, "prefix");
  if (!valid) return valid.error();
  return ConfigRange{state.path("/config/", ""), std::move(prefix)};
}

COORDINATION_API Result<ConfigRange> config_key(const CoordinatorState& state, std::string key) {
  auto valid = validate_key(key, "key");
  if (!valid) return valid.error();
  return ConfigRange{state.path("/config/", ""), std::move(key), false};
}

/// What `fn` makes of the range of `prefix`, or, where that is more than may be read, of what is
/// under it alone.
template <class Fn>
auto within_rights(const CoordinatorState& state, std::string prefix, Fn&& fn)
    -> decltype(fn(std::declval<ConfigRange>())) {
  auto range = config_range(state, std::move(prefix));
  if (!range) return range.error();
  auto done = fn(*range);
  if (done || done.error().code != ErrorCode::PermissionDenied) return done;
  range->itself = false;
  return fn(*range);
}

COORDINATION_API ConfigEvent config_event(const WatchEvent& event, std::size_t root) {
  ConfigEvent result;
  result.type = event.type;
  result.key = event.kv.key.substr(root);
  if (event.type == EventType::Put) result.value = wire::decode_config(event.kv.value);
  result.timestamp = std::chrono::system_clock::now();
  result.revision = event.revision;
  return result;
}

COORDINATION_API Result<WatchPlan<ConfigEvent>> config_plan(const CoordinatorState& state,
                                                            const Result<ConfigRange>& range,
                                                            const WatchOptions& options) {
  if (!range) return range.error();
  WatchPlan<ConfigEvent> plan;
  plan.client = state.client;
  plan.request = range->request<WatchRequest>();
  plan.request.queue_size = options.queue_size;
  plan.mode = RangeFeed::Mode::Live;
  plan.include_existing = options.include_existing;
  plan.decode = [range = *range](const WatchEvent& event) -> std::optional<ConfigEvent> {
    if (!range.contains(event.kv.key)) return std::nullopt;
    return config_event(event, range.root.size());
  };
  return plan;
}

COORDINATION_API ConfigEntry config_entry(const KeyValue& kv, std::string key) {
  ConfigEntry entry;
  entry.key = std::move(key);
  entry.value = wire::decode_config(kv.value);
  entry.revision = kv.mod_revision;
  return entry;
}

COORDINATION_API Error no_config(const std::string& key) {
  return make_error(ErrorCode::NotFound, "there is no configuration " + key);
}

}  // namespace detail

COORDINATION_API Result<ConfigEntry> ConfigCenter::get_entry(std::string key, Context ctx) {
  auto range = detail::config_key(*state_, key);
  if (!range) return range.error();
  auto found = state_->client->reads->call(range->request<RangeRequest>(), ctx);
  if (!found) return found.error();
  if (found->kvs.empty()) return detail::no_config(key);
  return detail::config_entry(found->kvs.front(), std::move(key));
}

COORDINATION_API Result<nlohmann::json> ConfigCenter::get(std::string key, Context ctx) {
  auto entry = get_entry(std::move(key), std::move(ctx));
  if (!entry) return entry.error();
  return std::move(entry->value);
}

COORDINATION_API Result<std::int64_t> ConfigCenter::set(std::string key,
                                                        const nlohmann::json& value, Context ctx) {
  auto bytes = detail::config_bytes(key, value);
  if (!bytes) return bytes.error();
  auto path = state_->path("/config/", key);
  ctx = state_->client->bounded(ctx);
  PutRequest put;
  put.key = path;
  put.value = *bytes;
  auto done = state_->client->puts->call(put, ctx);
  if (done) return done->revision;
  // Whether it has taken effect, where the answer was lost: then it is done, whoever did it.
  if (done.error().outcome == Outcome::NotApplied || ctx.done()) return done.error();
  RangeRequest range;
  range.key = path;
  auto now = state_->client->read(range, ctx);
  bool is_set = now && !now->kvs.empty() && now->kvs.front().value == *bytes;
  if (is_set) return now->kvs.front().mod_revision;
  return done.error();
}

COORDINATION_API Result<std::int64_t> ConfigCenter::compare_and_set(std::string key,
                                                                    std::int64_t expected_revision,
                                                                    const nlohmann::json& value,
                                                                    Context ctx) {
  auto bytes = detail::config_bytes(key, value);
  if (!bytes) return bytes.error();
  if (expected_revision < 0) return detail::invalid("the expected revision is negative");
  auto path = state_->path("/config/", key);
  Txn txn;
  txn.when(Compare::mod_revision(path, Compare::Is::Equal, expected_revision))
      .then(Op::put(path, *bytes));
  // A revision never comes back, but a missing key does: that is sent once. If a second attempt
  // finds a change, nobody can tell whose it is: an equal value may be somebody else's.
  auto safety = expected_revision > 0 ? detail::Safety::Idempotent : detail::Safety::Write;
  bool repeated = false;
  auto done = state_->client->commit(txn, safety, ctx, &repeated);
  if (!done) return done.error();
  if (done->succeeded) return done->revision;
  auto what = "the configuration " + key + " was changed since revision " +
              std::to_string(expected_revision);
  if (!repeated) return detail::make_error(ErrorCode::Conflict, std::move(what));
  return detail::make_error(ErrorCode::Connection, std::move(what),
                            "perhaps by this call: the answer to it was lost",
                            Outcome::MaybeApplied);
}

COORDINATION_API Result<std::int64_t> ConfigCenter::remove(std::string key, Context ctx) {
  auto valid = detail::validate_key(key, "key");
  if (!valid) return valid.error();
  ctx = state_->client->bounded(ctx);
  RemoveRequest remove;
  remove.key = state_->path("/config/", key);
  auto done = state_->client->removals->call(remove, ctx);
  if (done && done->deleted > 0) return done->revision;
  if (done) return detail::no_config(key);
  return done.error();
}

COORDINATION_API Result<std::vector<std::string>> ConfigCenter::list(std::string prefix,
                                                                     Context ctx) {
  ctx = state_->client->bounded(ctx);
  auto read = [&](const detail::ConfigRange& range) -> Result<std::vector<std::string>> {
    auto request = range.request<RangeRequest>();
    request.keys_only = true;
    auto all = detail::read_range(*state_->client, request, ctx);
    if (!all) return all.error();
    std::vector<std::string> keys;
    for (auto& kv : all->first) {
      if (range.contains(kv.key)) keys.push_back(kv.key.substr(range.root.size()));
    }
    return keys;
  };
  return detail::within_rights(*state_, std::move(prefix), read);
}

COORDINATION_API Result<Watch<ConfigEvent>> ConfigCenter::watch(std::string key, Context ctx) {
  return watch(std::move(key), WatchOptions{}, std::move(ctx));
}

COORDINATION_API Result<Watch<ConfigEvent>> ConfigCenter::watch(std::string key,
                                                                WatchOptions options, Context ctx) {
  auto range = detail::config_key(*state_, std::move(key));
  return detail::open_watch(detail::config_plan(*state_, range, options), ctx);
}

COORDINATION_API Result<Subscription> ConfigCenter::watch(
    std::string key, std::function<void(const ConfigEvent&)> handler, WatchOptions options,
    Context ctx) {
  auto range = detail::config_key(*state_, std::move(key));
  return detail::subscribe(detail::config_plan(*state_, range, options), std::move(handler), ctx);
}

COORDINATION_API Result<Watch<ConfigEvent>> ConfigCenter::watch_prefix(std::string prefix,
                                                                       Context ctx) {
  return watch_prefix(std::move(prefix), WatchOptions{}, std::move(ctx));
}

COORDINATION_API Result<Watch<ConfigEvent>> ConfigCenter::watch_prefix(std::string prefix,
                                                                       WatchOptions options,
                                                                       Context ctx) {
  ctx = state_->client->bounded(ctx);
  return detail::within_rights(*state_, std::move(prefix), [&](const detail::ConfigRange& range) {
    return detail::open_watch(detail::config_plan(*state_, range, options), ctx);
  });
}

COORDINATION_API Result<Subscription> ConfigCenter::watch_prefix(
    std::string prefix, std::function<void(const ConfigEvent&)> handler, WatchOptions options,
    Context ctx) {
  ctx = state_->client->bounded(ctx);
  return detail::within_rights(*state_, std::move(prefix), [&](const detail::ConfigRange& range) {
    return detail::subscribe(detail::config_plan(*state_, range, options), handler, ctx);
  });
}

COORDINATION_API Result<ConfigView> ConfigCenter::view(std::string prefix, Context ctx) {
  ctx = state_->client->bounded(ctx);
  auto open = [&](const detail::ConfigRange& range) {
    auto shows = [range](const std::string& key) { return range.contains(key); };
    auto request = range.request<WatchRequest>();
    return detail::open_view<ConfigView>(*state_, std::move(request), range.root, shows, ctx);
  };
  return detail::within_rights(*state_, std::move(prefix), open);
}

COORDINATION_API Result<ConfigEntry> ConfigView::get_entry(const std::string& key) const {
  auto path = core_->prefix + key;
  auto kv = core_->feed->look([&](const detail::RangeFeed::Known& known, std::int64_t) {
    auto it = known.find(path);
    return it == known.end() ? std::optional<KeyValue>() : it->second;
  });
  if (!kv || !core_->shows(path)) return core_->missing(detail::no_config(key).message);
  return detail::config_entry(*kv, key);
}

COORDINATION_API Result<nlohmann::json> ConfigView::get(const std::string& key) const {
  auto entry = get_entry(key);
  if (!entry) return entry.error();
  return std::move(entry->value);
}

COORDINATION_API std::vector<std::string> ConfigView::keys() const {
  return core_->feed->look([&](const detail::RangeFeed::Known& known, std::int64_t) {
    std::vector<std::string> keys;
    for (auto& entry : known) {
      if (core_->shows(entry.first)) keys.push_back(entry.first.substr(core_->prefix.size()));
    }
    return keys;
  });
}

// == 12. Coordinator ============================================================================

COORDINATION_API CoordinatorOptions default_coordinator_options() { return {}; }

namespace detail {

COORDINATION_API Result<void> validate_retry(const RetryConfig& retry) {
  if (retry.max_attempts < 0) return invalid("retry_config.max_attempts is negative");
  if (retry.initial_delay.count() <= 0 || retry.max_delay.count() <= 0) {
    return invalid("a delay in retry_config is not positive");
  }
  if (!(retry.multiplier > 1.0)) return invalid("retry_config.multiplier is not greater than 1");
  return {};
}

}  // namespace detail

COORDINATION_API Result<void> validate(const CoordinatorOptions& options) {
  if (options.endpoints.empty()) return detail::invalid("endpoints is empty");
  for (auto& endpoint : options.endpoints) {
    if (!detail::normal_endpoint(endpoint, false).empty()) continue;
    bool several = endpoint.find(',') != std::string::npos;
    return detail::invalid("the endpoint \"" + detail::printable(endpoint) + "\" is not " +
                           (several ? "one, but several: give each an element of endpoints"
                                    : "[http[s]://]host[:port]"));
  }
  if (options.timeout.count() <= 0) return detail::invalid("timeout is not positive");
  if (options.username.empty() && !options.password.empty()) {
    return detail::invalid("there is a password without a username");
  }
  auto& tls = options.tls;
  if ((tls.cert_file + tls.cert_pem).empty() != (tls.key_file + tls.key_pem).empty()) {
    return detail::invalid("tls.cert_file and tls.key_file are needed together");
  }
  if (options.limits.head == 0 || options.limits.body == 0) {
    return detail::invalid("a limit of limits is 0");
  }
  if (detail::is_shared(options.holder)) return detail::invalid("holder begins with \"shared\"");
  auto& prefix = options.key_prefix;
  if (!prefix.empty() && prefix[0] != '/') return detail::invalid("key_prefix must begin with '/'");
  if (!prefix.empty()) {
    auto valid = detail::validate_key(prefix.substr(1), "key_prefix");
    if (!valid) return valid;
  }
  return detail::validate_retry(options.retry_config);
}

namespace detail {

COORDINATION_API std::string host_and_process() {
#if defined(_WIN32)
  const char* host = std::getenv("COMPUTERNAME");
  return std::string(host ? host : "?") + ":" + std::to_string(_getpid());
#else
  std::array<char, 256> host{};
  if (gethostname(host.data(), host.size() - 1) != 0) host = {'?'};
  return std::string(host.data()) + ":" + std::to_string(getpid());
#endif
}

COORDINATION_API std::shared_ptr<ClientState> make_client(CoordinatorOptions options) {
  auto client = std::make_shared<ClientState>();
  client->executor = std::make_shared<Executor>(options.logger);
  client->log = client->executor->log;
  client->transport =
      options.transport ? options.transport : make_default_transport(options.tls, options.limits);
  client->clock = std::make_shared<SteadyClock>();
  if (options.clock) client->clock = std::make_shared<GuardedClock>(options.clock, client->log);
  std::vector<std::string> urls;
  for (auto& endpoint : options.endpoints) {
    auto url = normal_endpoint(endpoint, wants_tls(options.tls));
    if (std::find(urls.begin(), urls.end(), url) == urls.end()) urls.push_back(std::move(url));
  }
  client->members = std::make_unique<Members>(std::move(urls), client->open);
  client->reads = std::make_shared<Sharer<RangeRequest, RangeResponse>>(*client, Safety::Read,
                                                                        &ClientState::read);
  client->puts =
      std::make_shared<Sharer<PutRequest, PutResponse>>(*client, Safety::Write, &ClientState::put);
  client->removals = std::make_shared<Sharer<RemoveRequest, RemoveResponse>>(*client, Safety::Write,
                                                                             &ClientState::remove);
  client->leases = std::make_shared<LeaseKeeper>(client);
  client->watches = std::make_shared<WatchHub>(client);
  client->options = std::move(options);
  if (client->options.holder.empty()) client->options.holder = host_and_process();
  client->options.timeout = (std::min)(client->options.timeout, kLongest);
  std::weak_ptr<ClientState> weak = client;
  client->clock->on_jump([weak] {
    auto self = weak.lock();
    if (!self) return false;
    self->leases->wake();
    self->watches->look_after_streams();
    self->executor->settle();
    return true;
  });
  client->clock->on_due([weak]() -> std::optional<SteadyTime> {
    auto self = weak.lock();
    if (!self) return std::nullopt;
    self->watches->settle();
    return self->leases->next_due();
  });
  return client;
}

/// True for the first; the others wait for it, unless it may be waiting for them.
COORDINATION_API bool begin_close(CoordinatorState& state, SteadyTime patience) {
  auto& client = *state.client;
  bool in_handler = client.executor->runs_handler_here();
  std::unique_lock<std::mutex> lock(state.mutex);
  if (!client.closing.exchange(true)) {
    state.closer = std::this_thread::get_id();
    return true;
  }
  if (state.closed || in_handler || !HandlerWaits::all().begin(state.closer)) return false;
  state.changed.wait_until(lock, patience, [&] { return state.closed; });
  HandlerWaits::all().end();
  return false;
}

COORDINATION_API void close_coordinator(CoordinatorState& state,
                                        std::optional<SteadyTime> patience = std::nullopt) {
  auto now = steady_clock::now();
  if (!begin_close(state, patience.value_or(now + kLongest))) return;
  auto& client = *state.client;
  auto left = milliseconds(1000) - (std::min)(milliseconds(client.waited), milliseconds(500));
  client.watches->close();
  client.leases->close(now + left * 7 / 10);
  client.open.cancel();
  client.executor->stop(now + left * 19 / 20, patience);
  if (!client.options.transport) client.transport->close_idle();
  std::lock_guard<std::mutex> lock(state.mutex);
  state.closed = true;
  state.changed.notify_all();
}

/// Those that are open.
struct OpenCoordinators {
  std::mutex mutex;
  std::vector<std::weak_ptr<CoordinatorState>> states;
};

COORDINATION_API void close_open_ones() {
  auto& open = process_wide<OpenCoordinators>();
  std::unique_lock<std::mutex> lock(open.mutex);
  auto states = open.states;
  lock.unlock();
  for (auto& weak : states) {
    auto soon = steady_clock::now() + std::chrono::seconds(1);
    if (auto one = weak.lock()) close_coordinator(*one, soon);
  }
}

/// By exit(), which does not wait for handlers that do not return. It is told so again after the
/// first answer that each kind of transport has got: so their own static objects are still there.
COORDINATION_API void close_at_exit(const std::shared_ptr<CoordinatorState>& state) {
  static std::array<std::once_flag, 3> told;
  bool tls = state->client->members->url(0).compare(0, 6, "https:") == 0;
  std::size_t kind = state->client->options.transport ? 0 : tls ? 1 : 2;
  std::call_once(told.at(kind), [] { std::atexit(close_open_ones); });
  auto& open = process_wide<OpenCoordinators>();
  std::lock_guard<std::mutex> lock(open.mutex);
  auto& all = open.states;
  auto is_gone = [](const auto& weak) { return weak.expired(); };
  all.erase(std::remove_if(all.begin(), all.end(), is_gone), all.end());
  all.push_back(state);
}

/// What handles stand for that hold nothing: the states of a Coordinator that is closed.
struct StandIns {
  std::tuple<std::shared_ptr<ClientState>, std::shared_ptr<CoordinatorState>,
             std::shared_ptr<LeaseState>, std::shared_ptr<OwnedKey>, RegistrationPtr,
             std::shared_ptr<ViewCore>>
      all;

  StandIns() {
    auto coordinator = std::make_shared<CoordinatorState>();
    auto client = coordinator->client = make_client({});
    coordinator->registry = std::make_shared<RegistryState>();
    close_coordinator(*coordinator);
    auto strand =
        std::make_shared<Strand>(client->executor, client->executor->losses, client->log, "");
    auto lease = std::make_shared<LeaseState>(0, client->clock, std::move(strand));
    lease->client = client;
    lease->release();
    auto owned = std::make_shared<OwnedKey>(client, "", 0, lease);
    auto registration = std::make_shared<RegistrationState>(client, "", "");
    auto view = std::make_shared<ViewCore>(client, WatchRequest());
    view->end = closed_error();
    view->shows = [](const std::string&) { return false; };
    lease->loss.shut();
    owned->loss.shut();
    view->ended->shut();
    all = {client, coordinator, lease, owned, registration, view};
  }
};

template <class State>
const std::shared_ptr<State>& stand_in() {
  return std::get<std::shared_ptr<State>>(process_wide<StandIns>().all);
}
#if !COORDINATION_HEADER_ONLY  // for the other files; where all is here it makes itself
template const std::shared_ptr<ClientState>& stand_in<ClientState>();
template const std::shared_ptr<CoordinatorState>& stand_in<CoordinatorState>();
template const std::shared_ptr<LeaseState>& stand_in<LeaseState>();
template const std::shared_ptr<OwnedKey>& stand_in<OwnedKey>();
template const std::shared_ptr<RegistrationState>& stand_in<RegistrationState>();
template const std::shared_ptr<ViewCore>& stand_in<ViewCore>();
#endif

}  // namespace detail

COORDINATION_API Result<Coordinator> Coordinator::connect(CoordinatorOptions options, Context ctx) {
  auto valid = validate(options);
  if (!valid) return valid.error();
  auto state = std::make_shared<detail::CoordinatorState>();
  state->client = detail::make_client(std::move(options));
  state->registry = std::make_shared<detail::RegistryState>();
  Coordinator coordinator(state);
  if (!state->client->options.tls.verify_server) {
    (*state->client->log)(
        LogLevel::Warn, "tls.verify_server is false: anybody can pretend to be etcd, and read all");
  }
  auto usable = state->client->transport->check();
  if (!usable) return usable.error();
  if (!state->client->executor->timer.start()) {
    return detail::make_error(ErrorCode::Unavailable, "cannot connect",
                              "the system has no thread to give");
  }
  auto served = detail::knock(*state->client, state->client->bounded(ctx));
  if (!served) return served.error();
  auto& members = *state->client->members;
  auto& endpoint = members.url(members.current());
  (*state->client->log)(LogLevel::Info, "connected", {{"endpoint", endpoint}});
  detail::close_at_exit(state);
  return coordinator;
}

COORDINATION_API Coordinator::Coordinator(std::shared_ptr<detail::CoordinatorState> state)
    : state_(std::move(state)), lock_(state_), registry_(state_), config_(state_),
      election_(state_), client_(state_->client) {}

COORDINATION_API void detail::let_go(const std::shared_ptr<CoordinatorState>& state) {
  close_coordinator(*state);
}

COORDINATION_API Result<void> Coordinator::close() {
  auto keep = state_.get();  // a handler may destroy the Coordinator meanwhile
  detail::close_coordinator(*keep);
  return {};
}

// == 13. Globals ================================================================================

namespace detail {

struct Globals {
  Gate gate;  // its mutex guards the rest
  CoordinatorOptions options{default_coordinator_options()};
  std::shared_ptr<Coordinator> coordinator;
  std::weak_ptr<Coordinator> closing;  // the one before
  std::optional<Context> connecting;   // of the one who makes it; the others wait
  std::uint64_t attempts{0};           // to make one
};

COORDINATION_API Globals& globals() { return process_wide<Globals>(); }

COORDINATION_API milliseconds default_timeout() {
  std::lock_guard<std::mutex> lock(globals().gate.mutex);
  return globals().options.timeout;
}

/// Calls `fn` with the default Coordinator; connecting and calling share one time limit, that of
/// `ctx` from now on.
template <class Fn>
auto with_default(Context& ctx, Fn&& fn) -> decltype(fn(std::declval<Coordinator&>())) {
  if (!ctx.deadline()) ctx = join_contexts({&ctx}, steady_clock::now() + default_timeout());
  auto coordinator = default_coordinator(ctx);
  if (!coordinator) return coordinator.error();
  return fn(**coordinator);
}

}  // namespace detail

COORDINATION_API Result<void> set_default_options(CoordinatorOptions options) {
  auto valid = validate(options);
  if (!valid) return valid;
  auto& globals = detail::globals();
  std::lock_guard<std::mutex> lock(globals.gate.mutex);
  if (globals.coordinator || globals.connecting) {
    return detail::make_error(ErrorCode::Conflict, "the default coordinator is in use");
  }
  globals.options = std::move(options);
  return {};
}

COORDINATION_API Result<std::shared_ptr<Coordinator>> default_coordinator(Context ctx) {
  auto& globals = detail::globals();
  std::shared_ptr<Coordinator> found;
  Context mine = Context::child_of(ctx);
  CoordinatorOptions options;
  auto decide = [&] {
    if (globals.connecting) return false;
    found = globals.coordinator;
    if (found) return true;
    globals.connecting = mine;
    ++globals.attempts;
    options = globals.options;
    return true;
  };
  auto limit = std::chrono::steady_clock::now() + detail::default_timeout();
  if (!globals.gate.wait(ctx, decide, limit)) {
    return detail::context_error(ctx, "the default coordinator is not connected yet");
  }
  if (found) return found;
  auto made = Coordinator::connect(std::move(options), mine);
  std::lock_guard<std::mutex> lock(globals.gate.mutex);
  globals.connecting.reset();
  globals.gate.changed.notify_all();
  if (!made) return made.error();
  if (mine.cancelled()) return detail::closed_error();
  return globals.coordinator = std::make_shared<Coordinator>(std::move(*made));
}

COORDINATION_API Result<void> close() {
  std::shared_ptr<Coordinator> coordinator;
  auto& globals = detail::globals();
  std::uint64_t attempt = 0;
  {
    std::lock_guard<std::mutex> lock(globals.gate.mutex);
    if (globals.connecting) globals.connecting->cancel();
    attempt = globals.attempts;
    coordinator = globals.coordinator ? globals.coordinator : globals.closing.lock();
    globals.closing = coordinator;
    globals.coordinator.reset();
  }
  globals.gate.wait(Context::with_timeout(milliseconds(500)),
                    [&] { return !globals.connecting || globals.attempts != attempt; });
  if (!coordinator) return {};
  return coordinator->close();
}

COORDINATION_API Result<Lock> acquire_lock(std::string key, milliseconds ttl, Context ctx) {
  auto connecting = ctx;
  return detail::with_default(connecting, [&](auto& c) { return c.lock().acquire(key, ttl, ctx); });
}

COORDINATION_API Result<Lock> try_acquire_lock(std::string key, milliseconds ttl, Context ctx) {
  return detail::with_default(ctx, [&](auto& c) { return c.lock().try_acquire(key, ttl, ctx); });
}

COORDINATION_API Result<std::int64_t> register_service(ServiceInfo service, Context ctx) {
  return detail::with_default(ctx,
                              [&](auto& c) { return c.registry().register_service(service, ctx); });
}

COORDINATION_API Result<std::int64_t> unregister_service(std::string id, Context ctx) {
  return detail::with_default(ctx, [&](auto& c) { return c.registry().unregister(id, ctx); });
}

COORDINATION_API Result<std::vector<ServiceInfo>> discover_services(std::string name, Context ctx) {
  return detail::with_default(ctx, [&](auto& c) { return c.registry().discover(name, ctx); });
}

COORDINATION_API Result<Watch<ServiceEvent>> watch_services(std::string name, Context ctx) {
  return detail::with_default(ctx, [&](auto& c) { return c.registry().watch(name, ctx); });
}

COORDINATION_API Result<Subscription> watch_services(
    std::string name, std::function<void(const ServiceEvent&)> handler, Context ctx) {
  return detail::with_default(ctx, [&](auto& c) { return c.registry().watch(name, handler, ctx); });
}

COORDINATION_API Result<nlohmann::json> get_config(std::string key, Context ctx) {
  return detail::with_default(ctx, [&](auto& c) { return c.config().get(key, ctx); });
}

COORDINATION_API Result<std::int64_t> set_config(std::string key, const nlohmann::json& value,
                                                 Context ctx) {
  return detail::with_default(ctx, [&](auto& c) { return c.config().set(key, value, ctx); });
}

COORDINATION_API Result<std::int64_t> delete_config(std::string key, Context ctx) {
  return detail::with_default(ctx, [&](auto& c) { return c.config().remove(key, ctx); });
}

COORDINATION_API Result<Watch<ConfigEvent>> watch_config(std::string key, Context ctx) {
  return detail::with_default(ctx, [&](auto& c) { return c.config().watch(key, ctx); });
}

COORDINATION_API Result<Subscription> watch_config(std::string key,
                                                   std::function<void(const ConfigEvent&)> handler,
                                                   Context ctx) {
  return detail::with_default(ctx, [&](auto& c) { return c.config().watch(key, handler, ctx); });
}

COORDINATION_API Result<std::vector<std::string>> list_configs(std::string prefix, Context ctx) {
  return detail::with_default(ctx, [&](auto& c) { return c.config().list(prefix, ctx); });
}

// == 14. MemoryEtcd =============================================================================

#if COORDINATION_MEMORY_ETCD

// The gateway's half of Wire: what MemoryEtcd reads and writes.

namespace detail::wire::gateway {

/// An answer of etcd's that is an error.
struct Refusal {
  int status;  // of HTTP
  int code;    // of gRPC
  const char* message;
};

namespace refused {
inline constexpr Refusal kBadJson{400, 3, "proto: syntax error, or a field of the wrong type"};
inline constexpr Refusal kEmptyKey{400, 3, "etcdserver: key is not provided"};
inline constexpr Refusal kEmptyUser{400, 3, "etcdserver: user name is empty"};
inline constexpr Refusal kKeyNotFound{400, 3, "etcdserver: key not found"};
inline constexpr Refusal kValueGiven{400, 3, "etcdserver: value is provided"};
inline constexpr Refusal kLeaseGiven{400, 3, "etcdserver: lease is provided"};
inline constexpr Refusal kDuplicateKey{400, 3, "etcdserver: duplicate key given in txn request"};
inline constexpr Refusal kTooManyOps{400, 3, "etcdserver: too many operations in txn request"};
inline constexpr Refusal kTooLarge{400, 3, "etcdserver: request is too large"};
inline constexpr Refusal kFarTooLarge{429, 8, "grpc: received message larger than max"};
inline constexpr Refusal kWrongPassword{
    400, 3, "etcdserver: authentication failed, invalid user ID or password"};
inline constexpr Refusal kNotFound{404, 5, "Not Found"};
inline constexpr Refusal kLeaseNotFound{404, 5, "etcdserver: requested lease not found"};
inline constexpr Refusal kDenied{403, 7, "etcdserver: permission denied"};
inline constexpr Refusal kLeaseExists{400, 9, "etcdserver: lease already exists"};
inline constexpr Refusal kAuthIsOff{400, 9, "etcdserver: authentication is not enabled"};
inline constexpr Refusal kCompacted{400, 11,
                                    "etcdserver: mvcc: required revision has been compacted"};
inline constexpr Refusal kFuture{400, 11,
                                 "etcdserver: mvcc: required revision is a future revision"};
inline constexpr Refusal kTtlTooLarge{400, 11, "etcdserver: too large lease TTL"};
inline constexpr Refusal kNoLeader{503, 14, "etcdserver: no leader"};
inline constexpr Refusal kBadToken{401, 16, "etcdserver: invalid auth token"};
}  // namespace refused

// Requests and answers that Part B has no struct for.
struct CompactRequest {
  std::int64_t revision{0};
};
struct GrantRequest {
  std::int64_t id{0};
  std::int64_t ttl{0};  // seconds, as all of etcd's
};
struct RevokeRequest {
  std::int64_t id{0};
};
struct KeepAliveRequest {
  std::int64_t id{0};
};
struct TimeToLiveRequest {
  std::int64_t id{0};
  bool keys{false};
};
struct LeasesRequest {};
struct StatusRequest {};
struct LoginRequest {
  std::string name;
  std::string password;
};
struct WatchCreate {
  std::int64_t id{0};
  std::string key;
  std::string range_end;
  std::int64_t start_revision{0};
  bool prev_kv{false};
  bool no_put{false}, no_delete{false};
};
/// One object in the body of a watch request.
struct WatchOrder {
  std::optional<WatchCreate> create;
  std::optional<std::int64_t> cancel;
  bool progress{false};
};

struct EmptyResponse {
  std::int64_t revision{0};
};
struct LeaseResponse {
  std::int64_t revision{0};
  std::int64_t id{0};
  std::int64_t ttl{0};  // of a lease that is gone: -1 from timetolive, 0 from keepalive
  std::int64_t granted_ttl{0};
  std::vector<std::string> keys{};
};
struct LeasesResponse {
  std::int64_t revision{0};
  std::vector<std::int64_t> ids;
};
struct LoginResponse {
  std::int64_t revision{0};
  std::string token;
};

/// What happened to a key at kv->mod_revision. A deletion has version 0.
struct Change {
  std::shared_ptr<const KeyValue> kv;
  std::shared_ptr<const KeyValue> prev;  // null if there was none
};
/// One line of a watch stream.
struct StreamLine {
  std::int64_t revision{0};
  std::int64_t watch_id{0};
  bool created{false}, canceled{false};
  std::string reason{};
  std::int64_t compact_revision{0};
  bool prev_kv{false};  // whether `changes` are to be written with their prev
  std::vector<Change> changes{};
};

/// An enum, by name or number. An unknown name is 0: so it is in etcd 3.5.
COORDINATION_API int choice(const Node& value, std::initializer_list<std::string_view> names) {
  if (auto* number = value.as<std::uint64_t>()) return static_cast<int>(*number);
  int index = 0;
  for (auto name : names) {
    if (value.is_string() && *value.as<std::string_view>() == name) return index;
    ++index;
  }

  return 0;
}

COORDINATION_API void decode(const Node& json, RangeRequest& to) {
  to.key = bytes(json, "key");
  to.range_end = bytes(json, "range_end");
  to.limit = number(json, "limit");
  to.revision = number(json, "revision");
  to.sort_order = SortOrder(choice(member(json, "sort_order"), {"NONE", "ASCEND", "DESCEND"}));
  to.sort_target =
      SortTarget(choice(member(json, "sort_target"), {"KEY", "VERSION", "CREATE", "MOD", "VALUE"}));
  to.serializable = flag(json, "serializable");
  to.keys_only = flag(json, "keys_only");
  to.count_only = flag(json, "count_only");
  to.min_mod_revision = number(json, "min_mod_revision");
  to.max_mod_revision = number(json, "max_mod_revision");
  to.min_create_revision = number(json, "min_create_revision");
  to.max_create_revision = number(json, "max_create_revision");
}

COORDINATION_API void decode(const Node& json, PutRequest& to) {
  to.key = bytes(json, "key");
  to.value = bytes(json, "value");
  to.lease = number(json, "lease");
  to.prev_kv = flag(json, "prev_kv");
  to.ignore_value = flag(json, "ignore_value");
  to.ignore_lease = flag(json, "ignore_lease");
}

COORDINATION_API void decode(const Node& json, RemoveRequest& to) {
  to.key = bytes(json, "key");
  to.range_end = bytes(json, "range_end");
  to.prev_kv = flag(json, "prev_kv");
}

COORDINATION_API void decode(const Node& json, Compare& to) {
  static constexpr const char* kFields[] = {"version", "create_revision", "mod_revision", "value",
                                            "lease"};
  to.key = bytes(json, "key");
  to.range_end = bytes(json, "range_end");
  to.is = Compare::Is(choice(member(json, "result"), {"EQUAL", "GREATER", "LESS", "NOT_EQUAL"}));
  const int target = choice(member(json, "target"), {"VERSION", "CREATE", "MOD", "VALUE", "LEASE"});
  to.target = static_cast<Compare::Target>(target);
  to.bytes = bytes(json, "value");
  if (target >= 0 && target < 5) to.number = number(json, kFields[target]);
}

COORDINATION_API void decode(const Node& json, Txn& to);

template <class Request>
Request decode_as(const Node& json) {
  Request request;
  decode(json, request);
  return request;
}

/// An operation of no known kind becomes a Txn that is null.
COORDINATION_API Op decode_op(const Node& json) {
  const auto field = [&json](const char* name) -> const Node& { return member(json, name); };
  const Node& range = field("request_range");
  if (!range.is_null()) return {decode_as<RangeRequest>(range)};
  const Node& put = field("request_put");
  if (!put.is_null()) return {decode_as<PutRequest>(put)};
  const Node& remove = field("request_delete_range");
  if (!remove.is_null()) return {decode_as<RemoveRequest>(remove)};
  const Node& txn = field("request_txn");
  if (!txn.is_null()) return {std::make_shared<const Txn>(decode_as<Txn>(txn))};
  return {std::shared_ptr<const Txn>()};
}

COORDINATION_API void decode(const Node& json, Txn& to) {
  for (const Node& compare : member(json, "compare")) to.when(decode_as<Compare>(compare));
  for (const Node& op : member(json, "success")) to.then(decode_op(op));
  for (const Node& op : member(json, "failure")) to.otherwise(decode_op(op));
}

COORDINATION_API void decode(const Node& json, CompactRequest& to) {
  to.revision = number(json, "revision");
}

COORDINATION_API void decode(const Node& json, GrantRequest& to) {
  to.id = number(json, "ID");
  to.ttl = number(json, "TTL");
}

COORDINATION_API void decode(const Node& json, RevokeRequest& to) { to.id = number(json, "ID"); }

COORDINATION_API void decode(const Node& json, KeepAliveRequest& to) { to.id = number(json, "ID"); }

COORDINATION_API void decode(const Node& json, TimeToLiveRequest& to) {
  to.id = number(json, "ID");
  to.keys = flag(json, "keys");
}

COORDINATION_API void decode(const Node&, LeasesRequest&) {}
COORDINATION_API void decode(const Node&, StatusRequest&) {}

COORDINATION_API void decode(const Node& json, LoginRequest& to) {
  to.name = text(json, "name");
  to.password = text(json, "password");
}

COORDINATION_API void decode(const Node& json, WatchCreate& to) {
  to.id = number(json, "watch_id");
  to.key = bytes(json, "key");
  to.range_end = bytes(json, "range_end");
  to.start_revision = number(json, "start_revision");
  to.prev_kv = flag(json, "prev_kv");
  for (const Node& filter : member(json, "filters")) {
    (choice(filter, {"NOPUT", "NODELETE"}) == 0 ? to.no_put : to.no_delete) = true;
  }
}

COORDINATION_API void decode(const Node& json, WatchOrder& to) {
  const Node& create = member(json, "create_request");
  if (!create.is_null()) to.create = decode_as<WatchCreate>(create);
  const Node& cancel = member(json, "cancel_request");
  if (!cancel.is_null()) to.cancel = number(cancel, "watch_id");
  to.progress = !member(json, "progress_request").is_null();
}

/// Cuts the first JSON object off `input`; empty if there is none, or no whole one.
COORDINATION_API std::string_view take_object(std::string_view& input) {
  const auto begin = input.find_first_not_of(" \t\r\n");
  if (begin == std::string_view::npos || input[begin] != '{') return {};
  int depth = 0;
  bool in_string = false;
  for (std::size_t i = begin; i < input.size(); ++i) {
    const char c = input[i];
    if (in_string && c == '\\') {
      ++i;
    } else if (c == '"') {
      in_string = !in_string;
    } else if (!in_string) {
      depth += c == '{' ? 1 : c == '}' ? -1 : 0;
      if (depth > 0) continue;
      const std::string_view object = input.substr(begin, i + 1 - begin);
      input.remove_prefix(i + 1);
      return object;
    }
  }

  return {};
}

/// The one request in a body; empty if that is malformed.
template <class Request>
std::optional<Request> decode_body(std::string_view body) {
  if (body.empty()) return Request();
  const Document document(take_object(body));
  if (!document.root()) return std::nullopt;
  return decode_as<Request>(*document.root());
}

/// The requests of a streaming call; the first that is malformed ends them, as in etcd.
template <class Request>
std::vector<Request> decode_stream(std::string_view body) {
  std::vector<Request> requests;
  while (true) {
    const Document document(take_object(body));
    if (!document.root()) break;
    requests.push_back(decode_as<Request>(*document.root()));
  }

  return requests;
}

/// A member that is an array, unless it is empty.
template <class Item, class Write>
void write_list(Object& object, const char* name, const std::vector<Item>& items, Write write) {
  for (const Item& item : items) {
    write(&item == &items.front() ? object.member(name) += '[' : object.out() += ',', item);
  }
  if (!items.empty()) object.out() += ']';
}

COORDINATION_API void encode(std::string& out, const KeyValue& kv) {
  Object object(out);
  object.bytes("key", kv.key);
  object.bytes("value", kv.value);
  object.number("create_revision", kv.create_revision);
  object.number("mod_revision", kv.mod_revision);
  object.number("version", kv.version);
  object.number("lease", kv.lease);
}

COORDINATION_API void write_kvs(Object& object, const char* name,
                                const std::vector<KeyValue>& kvs) {
  write_list(object, name, kvs, [](std::string& out, const KeyValue& kv) { encode(out, kv); });
}

// What follows the header of an answer.

COORDINATION_API void encode(Object& out, const RangeResponse& response) {
  write_kvs(out, "kvs", response.kvs);
  out.flag("more", response.more);
  out.number("count", response.count);
}

COORDINATION_API void encode(Object& out, const PutResponse& response) {
  if (response.prev_kv) encode(out.member("prev_kv"), *response.prev_kv);
}

COORDINATION_API void encode(Object& out, const RemoveResponse& response) {
  out.number("deleted", response.deleted);
  write_kvs(out, "prev_kvs", response.prev_kvs);
}

COORDINATION_API void encode(Object& out, const TxnResponse& response);

template <class Response>
void write_op(Object& op, const char* name, const Response& response, std::int64_t revision) {
  Object inner(op.member(name));
  Object(inner.member("header")).number("revision", revision);
  encode(inner, response);
}

COORDINATION_API void encode(std::string& out, const OpResponse& response) {
  Object op(out);
  if (auto* range = std::get_if<RangeResponse>(&response)) {
    write_op(op, "response_range", *range, range->revision);
  } else if (auto* put = std::get_if<PutResponse>(&response)) {
    write_op(op, "response_put", *put, put->revision);
  } else if (auto* remove = std::get_if<RemoveResponse>(&response)) {
    write_op(op, "response_delete_range", *remove, remove->revision);
  } else {
    write_op(op, "response_txn", **std::get_if<3>(&response), 0);
  }
}

COORDINATION_API void encode(Object& out, const TxnResponse& response) {
  out.flag("succeeded", response.succeeded);
  write_list(out, "responses", response.responses,
             [](std::string& to, const OpResponse& op) { encode(to, op); });
}

COORDINATION_API void encode(Object&, const EmptyResponse&) {}

COORDINATION_API void encode(Object& out, const LeaseResponse& response) {
  out.number("ID", response.id);
  out.number("TTL", response.ttl);
  out.number("grantedTTL", response.granted_ttl);
  write_list(out, "keys", response.keys,
             [](std::string& to, const std::string& key) { to += '"' + base64_encode(key) + '"'; });
}

COORDINATION_API void encode(Object& out, const LeasesResponse& response) {
  write_list(out, "leases", response.ids,
             [](std::string& to, std::int64_t id) { to += lease_body(id); });
}

COORDINATION_API void encode(Object& out, const LoginResponse& response) {
  out.text("token", response.token);
}

COORDINATION_API void encode(Object& out, const Status& status) {
  out.text("version", status.version);
  out.number("dbSize", status.db_size);
  out.number("leader", static_cast<std::int64_t>(status.leader));
  out.number("raftTerm", static_cast<std::int64_t>(status.raft_term));
}

COORDINATION_API void encode(std::string& out, const Change& change, bool prev_kv) {
  Object object(out);
  if (change.kv->version == 0) object.text("type", "DELETE");
  encode(object.member("kv"), *change.kv);
  if (prev_kv && change.prev) encode(object.member("prev_kv"), *change.prev);
}

COORDINATION_API void encode(Object& out, const StreamLine& line) {
  out.number("watch_id", line.watch_id);
  out.flag("created", line.created);
  out.flag("canceled", line.canceled);
  out.number("compact_revision", line.compact_revision);
  if (!line.reason.empty()) out.text("cancel_reason", line.reason);
  write_list(out, "events", line.changes,
             [&](std::string& to, const Change& change) { encode(to, change, line.prev_kv); });
}

/// With whose answer it is.
COORDINATION_API void write_header(Object& out, std::uint64_t cluster_id, std::int64_t revision) {
  Object header(out.member("header"));
  header.text("cluster_id", std::to_string(cluster_id));
  header.text("member_id", "1");
  header.number("revision", revision);
  header.text("raft_term", "2");
}

/// The body of a unary answer.
template <class Response>
std::string write_body(std::uint64_t cluster_id, const Response& response) {
  std::string body;
  {
    Object object(body);
    write_header(object, cluster_id, response.revision);
    encode(object, response);
  }
  return body;
}

/// One line of a streamed answer.
template <class Response>
std::string write_line(std::uint64_t cluster_id, const Response& response) {
  return "{\"result\":" + write_body(cluster_id, response) + "}\n";
}

COORDINATION_API std::string error_body(const Refusal& refusal) {
  return "{\"code\":" + std::to_string(refusal.code) + ",\"message\":\"" + refusal.message + "\"}";
}

COORDINATION_API std::string error_line(const Refusal& refusal) {
  return "{\"error\":" + error_body(refusal) + "}\n";
}

/// What a watch that is refused gives as its reason.
COORDINATION_API std::string watch_reason(const Refusal& refusal) {
  const char* name = refusal.code == 3    ? "InvalidArgument"
                     : refusal.code == 16 ? "Unauthenticated"
                                          : "PermissionDenied";
  return std::string("rpc error: code = ") + name + " desc = " + refusal.message;
}

}  // namespace detail::wire::gateway

namespace detail::memory {

using namespace wire::gateway;

using MaybeRefusal = std::optional<Refusal>;

/// What was asked for, or why it was refused.
template <class T>
struct Answer {
  Answer(T answer) : value(std::move(answer)) {}
  Answer(const Refusal& why) : refusal(why) {}

  std::optional<T> value{};
  MaybeRefusal refusal{};
};

/// Whether `key` is in the range from `first` to `end`, as etcd's range_end means it.
COORDINATION_API bool in_range(const std::string& key, const std::string& first,
                               const std::string& end) {
  if (end.empty()) return key == first;
  if (end == std::string(1, '\0')) return key >= first;
  return key >= first && key < end;
}

// What etcd refuses before it looks at tokens or data.

inline constexpr std::size_t kMaxTxnOps = 128;
using TxnPtr = std::shared_ptr<const Txn>;

COORDINATION_API MaybeRefusal check_op(const RangeRequest& request, std::size_t) {
  return request.key.empty() ? MaybeRefusal(refused::kEmptyKey) : std::nullopt;
}

COORDINATION_API MaybeRefusal check_op(const RemoveRequest& request, std::size_t) {
  return request.key.empty() ? MaybeRefusal(refused::kEmptyKey) : std::nullopt;
}

COORDINATION_API MaybeRefusal check_op(const PutRequest& request, std::size_t) {
  if (request.key.empty()) return refused::kEmptyKey;
  if (request.ignore_value && !request.value.empty()) return refused::kValueGiven;
  if (request.ignore_lease && request.lease != 0) return refused::kLeaseGiven;
  return std::nullopt;
}

COORDINATION_API MaybeRefusal check_op(const TxnPtr& txn, std::size_t budget) {
  if (!txn) return refused::kKeyNotFound;
  const std::size_t size =
      (std::max)({txn->compare.size(), txn->success.size(), txn->failure.size()});
  if (size > budget) return refused::kTooManyOps;
  for (const Compare& compare : txn->compare) {
    if (compare.key.empty()) return refused::kEmptyKey;
  }

  for (const auto* ops : {&txn->success, &txn->failure}) {
    for (const Op& op : *ops) {
      const auto check = [&](const auto& inner) { return check_op(inner, budget - size); };
      if (const MaybeRefusal refusal = std::visit(check, op.request)) return refusal;
    }
  }

  return std::nullopt;
}

/// Finds the keys that a list of operations would write twice, as etcd's checkIntervals does.
class TxnWrites {
 public:
  /// False if a key is put twice, or put and removed.
  bool add(const std::vector<Op>& ops) {
    for (const Op& op : ops) {
      if (auto* request = std::get_if<RemoveRequest>(&op.request)) removed_.push_back(*request);
    }
    for (const Op& op : ops) {
      auto* txn = std::get_if<TxnPtr>(&op.request);
      if (txn && !add_inner(**txn)) return false;
    }
    for (const Op& op : ops) {
      auto* request = std::get_if<PutRequest>(&op.request);
      if (request && !add_put(request->key)) return false;
    }
    return true;
  }

 private:
  bool add_put(const std::string& key) { return !removes(key) && put_.insert(key).second; }

  // Only one branch is ever taken, so both may put the same key.
  bool add_inner(const Txn& txn) {
    TxnWrites success, failure;
    if (!success.add(txn.success) || !failure.add(txn.failure)) return false;
    for (const std::string& key : success.put_) {
      if (!add_put(key)) return false;
    }
    for (const std::string& key : failure.put_) {
      if (removes(key)) return false;
      if (!put_.insert(key).second && success.put_.count(key) == 0) return false;
    }
    for (const TxnWrites* writes : {&success, &failure}) {
      removed_.insert(removed_.end(), writes->removed_.begin(), writes->removed_.end());
    }
    return true;
  }

  bool removes(const std::string& key) const {
    return std::any_of(removed_.begin(), removed_.end(), [&](const RemoveRequest& range) {
      if (range.range_end.empty()) return key == range.key;
      return key >= range.key && key < range.range_end;  // "\0" is not the end of all here
    });
  }

  std::set<std::string> put_;
  std::vector<RemoveRequest> removed_;
};

template <class Request>
MaybeRefusal check(const Request& request) {
  constexpr bool kIsOp = std::is_constructible_v<decltype(Op::request), const Request&>;
  if constexpr (kIsOp) return check_op(request, kMaxTxnOps);
  return std::nullopt;
}

COORDINATION_API MaybeRefusal check(const Txn& txn) {
  const TxnPtr unowned(TxnPtr(), &txn);
  if (const MaybeRefusal refusal = check_op(unowned, kMaxTxnOps)) return refusal;
  for (const auto* ops : {&txn.success, &txn.failure}) {
    if (!TxnWrites().add(*ops)) return refused::kDuplicateKey;
  }

  return std::nullopt;
}

COORDINATION_API bool sorts_before(SortTarget target, const KeyValue& a, const KeyValue& b) {
  switch (target) {
    case SortTarget::Version: return a.version < b.version;
    case SortTarget::Create: return a.create_revision < b.create_revision;
    case SortTarget::Mod: return a.mod_revision < b.mod_revision;
    case SortTarget::Value: return a.value < b.value;
    default: return a.key < b.key;
  }
}

COORDINATION_API bool passes_filters(const RangeRequest& request, const KeyValue& kv) {
  const auto within = [](std::int64_t revision, std::int64_t min, std::int64_t max) {
    return (min == 0 || revision >= min) && (max == 0 || revision <= max);
  };
  return within(kv.mod_revision, request.min_mod_revision, request.max_mod_revision) &&
         within(kv.create_revision, request.min_create_revision, request.max_create_revision);
}

COORDINATION_API void sort_range(const RangeRequest& request, std::vector<const KeyValue*>& kvs) {
  const SortTarget target = request.sort_target;
  if (request.sort_order == SortOrder::Descend) {
    sort_stably(kvs, [target](const KeyValue* a, const KeyValue* b) {
      return sorts_before(target, *b, *a);
    });
  } else {  // etcd sorts by other targets than the key even if no order is given
    sort_stably(kvs, [target](const KeyValue* a, const KeyValue* b) {
      return sorts_before(target, *a, *b);
    });
  }
}

template <class T>
bool compares(const T& a, Compare::Is is, const T& b) {
  switch (is) {
    case Compare::Is::Greater: return a > b;
    case Compare::Is::Less: return a < b;
    case Compare::Is::NotEqual: return a != b;
    default: return a == b;
  }
}

COORDINATION_API bool compares(const KeyValue& kv, const Compare& compare) {
  switch (compare.target) {
    case Compare::Target::Create: return compares(kv.create_revision, compare.is, compare.number);
    case Compare::Target::Mod: return compares(kv.mod_revision, compare.is, compare.number);
    case Compare::Target::Lease: return compares(kv.lease, compare.is, compare.number);
    case Compare::Target::Value: return compares(kv.value, compare.is, compare.bytes);
    default: return compares(kv.version, compare.is, compare.number);
  }
}

/// Keys, revisions and leases: what etcd calls mvcc and lessor. It takes no lock and reads no
/// clock. Requests must have passed check().
class Mvcc {
 public:
  using TimePoint = Clock::time_point;
  using Record = std::shared_ptr<const KeyValue>;

  std::int64_t revision() const { return revision_; }
  std::int64_t compacted() const { return compacted_; }
  std::vector<std::string> keys() const {
    std::vector<std::string> result;
    for (const auto& [key, history] : keys_) {
      if (history.back()->version != 0) result.push_back(key);
    }
    return result;
  }

  std::vector<std::int64_t> leases() const {
    std::vector<std::int64_t> result;
    for (const auto& lease : leases_) result.push_back(lease.first);
    return result;
  }

  Answer<RangeResponse> range(const RangeRequest& request) const {
    if (request.revision > revision_) return refused::kFuture;
    if (request.revision > 0 && request.revision < compacted_) return refused::kCompacted;
    return apply(request);
  }

  Answer<PutResponse> put(const PutRequest& request) {
    if (lacks_lease(request)) return refused::kLeaseNotFound;
    if (lacks_key(request)) return refused::kKeyNotFound;
    PutResponse response = apply(request);
    finish();
    return response;
  }

  Answer<RemoveResponse> remove(const RemoveRequest& request) {
    RemoveResponse response = apply(request);
    finish();
    return response;
  }

  Answer<TxnResponse> commit(const Txn& txn) {
    const Branch branch = choose(txn);
    if (const MaybeRefusal refusal = refuse_any<PutRequest>(branch)) return *refusal;
    if (const MaybeRefusal refusal = refuse_any<RangeRequest>(branch)) return *refusal;
    TxnResponse response = apply(branch);
    finish();
    return response;
  }

  Answer<EmptyResponse> compact(std::int64_t revision) {
    if (revision <= compacted_) return refused::kCompacted;
    if (revision > revision_) return refused::kFuture;
    compacted_ = revision;
    while (!changes_.empty() && changes_.front().kv->mod_revision < revision) changes_.pop_front();
    for (Change& change : changes_) {
      if (change.kv->mod_revision == revision) change.prev = nullptr;
    }
    const auto newer = [](std::int64_t limit, const Record& kv) {
      return limit < kv->mod_revision;
    };
    for (auto it = keys_.begin(); it != keys_.end();) {
      History& history = it->second;
      auto keep = std::upper_bound(history.begin(), history.end(), revision, newer);
      if (keep != history.begin() && (*std::prev(keep))->version != 0) --keep;
      history.erase(history.begin(), keep);
      it = history.empty() ? keys_.erase(it) : std::next(it);
    }
    return EmptyResponse{revision_};
  }

  Answer<LeaseResponse> grant(GrantRequest request, TimePoint now) {
    constexpr std::int64_t kMinTtl = 2, kMaxTtl = 9'000'000'000;  // etcd's, with its defaults
    if (request.ttl > kMaxTtl) return refused::kTtlTooLarge;
    while (request.id == 0 || (request.id == next_lease_ && leases_.count(request.id) != 0)) {
      request.id = ++next_lease_;
    }
    if (leases_.count(request.id) != 0) return refused::kLeaseExists;
    const std::int64_t ttl = (std::max)(request.ttl, kMinTtl);
    const TimePoint expiry = now + std::chrono::seconds(ttl);
    leases_[request.id] = {ttl, expiry, {}};
    expiries_.emplace(expiry, request.id);
    return LeaseResponse{revision_, request.id, ttl};
  }

  Answer<EmptyResponse> revoke(std::int64_t id) {
    const auto lease = leases_.find(id);
    if (lease == leases_.end()) return refused::kLeaseNotFound;
    const std::set<std::string> keys = lease->second.keys;
    for (const std::string& key : keys) apply(RemoveRequest{key});
    finish();
    expiries_.erase({lease->second.expiry, id});
    leases_.erase(lease);
    return EmptyResponse{revision_};
  }

  LeaseResponse keep_alive(std::int64_t id, TimePoint now) {
    const auto lease = leases_.find(id);
    if (lease == leases_.end()) return {revision_, id};
    LeaseRecord& record = lease->second;
    expiries_.erase({record.expiry, id});
    record.expiry = now + std::chrono::seconds(record.ttl);
    expiries_.emplace(record.expiry, id);
    return {revision_, id, record.ttl};
  }

  LeaseResponse time_to_live(const TimeToLiveRequest& request, TimePoint now) const {
    const auto lease = leases_.find(request.id);
    if (lease == leases_.end()) return {revision_, request.id, -1};
    const auto& [ttl, expiry, keys] = lease->second;
    const auto left = std::chrono::duration_cast<std::chrono::seconds>(expiry - now);
    LeaseResponse response{revision_, request.id, left.count(), ttl};
    if (request.keys) response.keys.assign(keys.begin(), keys.end());
    return response;
  }

  /// The keys that go with a lease; empty if there is no such lease.
  std::set<std::string> keys_of(std::int64_t lease) const {
    const auto it = leases_.find(lease);
    return it == leases_.end() ? std::set<std::string>() : it->second.keys;
  }

  void expire(TimePoint now) {
    while (next_expiry() <= now) static_cast<void>(revoke(expiries_.begin()->second));
  }

  /// (TimePoint::max)() if there is no lease.
  TimePoint next_expiry() const {
    return expiries_.empty() ? (TimePoint::max)() : expiries_.begin()->first;
  }

  /// Calls `visit` with every change since `revision`, in order.
  template <class Visit>
  void changes_since(std::int64_t revision, Visit visit) const {
    const auto older = [](const Change& change, std::int64_t limit) {
      return change.kv->mod_revision < limit;
    };
    auto it = std::lower_bound(changes_.begin(), changes_.end(), revision, older);
    for (; it != changes_.end(); ++it) visit(*it);
  }

 private:
  using History = std::vector<Record>;  // the versions of one key, oldest first
  struct LeaseRecord {
    std::int64_t ttl;
    TimePoint expiry;
    std::set<std::string> keys;
  };
  // The branch that a Txn takes; settled for all levels before anything is written.
  struct Branch {
    bool succeeded;
    const std::vector<Op>* ops;
    std::vector<Branch> inner;
  };

  // The revision, counting what is written but not finished.
  std::int64_t head() const {
    return changes_.empty() ? revision_ : (std::max)(revision_, changes_.back().kv->mod_revision);
  }

  void finish() {
    revision_ = head();
    if (changes_.size() <= kMostChanges) return;
    static_cast<void>(compact(changes_[changes_.size() / 2].kv->mod_revision));
  }
  static constexpr std::size_t kMostChanges = 100'000;

  // The version that `revision` saw; null if there was none.
  static Record version_at(const History& history, std::int64_t revision) {
    const auto newer = [](std::int64_t limit, const Record& kv) {
      return limit < kv->mod_revision;
    };
    const auto next = std::upper_bound(history.begin(), history.end(), revision, newer);
    if (next == history.begin() || (*std::prev(next))->version == 0) return nullptr;
    return *std::prev(next);
  }

  Record find(const std::string& key, std::int64_t revision) const {
    const auto it = keys_.find(key);
    return it == keys_.end() ? nullptr : version_at(it->second, revision);
  }

  std::vector<const KeyValue*> select(const std::string& key, const std::string& range_end,
                                      std::int64_t revision) const {
    std::vector<const KeyValue*> result;
    for (auto it = keys_.lower_bound(key); it != keys_.end(); ++it) {
      if (!in_range(it->first, key, range_end)) break;
      if (const Record kv = version_at(it->second, revision)) result.push_back(kv.get());
    }
    return result;
  }

  RangeResponse apply(const RangeRequest& request) const {
    const std::int64_t revision = request.revision > 0 ? request.revision : head();
    auto kvs = select(request.key, request.range_end, revision);
    RangeResponse response;
    response.revision = head();
    response.count = static_cast<std::int64_t>(kvs.size());
    if (request.count_only) return response;

    // A limit without an order is applied before etcd filters and sorts; one more shows `more`.
    const bool filtered = request.min_mod_revision || request.max_mod_revision ||
                          request.min_create_revision || request.max_create_revision;
    const auto limit = static_cast<std::size_t>((std::max<std::int64_t>)(request.limit, 0));
    const bool early = limit != 0 && request.sort_order == SortOrder::None && !filtered;
    if (early && kvs.size() > limit + 1) kvs.resize(limit + 1);
    const auto fails = [&](const KeyValue* kv) { return !passes_filters(request, *kv); };
    kvs.erase(std::remove_if(kvs.begin(), kvs.end(), fails), kvs.end());
    sort_range(request, kvs);
    response.more = limit != 0 && kvs.size() > limit;
    if (response.more) kvs.resize(limit);
    for (const KeyValue* kv : kvs) {
      response.kvs.push_back(*kv);
      if (request.keys_only) response.kvs.back().value.clear();
    }
    return response;
  }

  PutResponse apply(const PutRequest& request) {
    const Record prev = find(request.key, head());
    auto kv = std::make_shared<KeyValue>();
    kv->key = request.key;
    kv->value = request.ignore_value ? prev->value : request.value;
    kv->lease = request.ignore_lease ? prev->lease : request.lease;
    kv->mod_revision = revision_ + 1;
    kv->create_revision = prev ? prev->create_revision : revision_ + 1;
    kv->version = prev ? prev->version + 1 : 1;
    record(std::move(kv));

    PutResponse response;
    response.revision = head();
    if (request.prev_kv && prev) response.prev_kv = *prev;
    return response;
  }

  RemoveResponse apply(const RemoveRequest& request) {
    RemoveResponse response;
    for (const KeyValue* prev : select(request.key, request.range_end, head())) {
      if (request.prev_kv) response.prev_kvs.push_back(*prev);
      auto kv = std::make_shared<KeyValue>();
      kv->key = prev->key;
      kv->mod_revision = revision_ + 1;
      record(std::move(kv));
      ++response.deleted;
    }
    response.revision = head();
    return response;
  }

  void record(Record kv) {
    const Record last = find(kv->key, head());
    if (last && last->lease != 0) leases_.at(last->lease).keys.erase(kv->key);
    if (kv->lease != 0) leases_.at(kv->lease).keys.insert(kv->key);
    // What a watch calls prev_kv is older than the whole txn, and none if the key is new.
    Record before = kv->version == 1 ? nullptr : find(kv->key, revision_);
    keys_[kv->key].push_back(kv);
    changes_.push_back({std::move(kv), std::move(before)});
  }

  bool lacks_lease(const PutRequest& request) const {
    return request.lease != 0 && leases_.count(request.lease) == 0;
  }

  bool lacks_key(const PutRequest& request) const {
    return (request.ignore_value || request.ignore_lease) && !find(request.key, revision_);
  }

  // In a Txn etcd looks for the key first.
  MaybeRefusal refuse(const PutRequest& request) const {
    if (lacks_key(request)) return refused::kKeyNotFound;
    if (lacks_lease(request)) return refused::kLeaseNotFound;
    return std::nullopt;
  }

  MaybeRefusal refuse(const RangeRequest& request) const {
    if (request.revision > revision_) return refused::kFuture;
    if (request.revision != 0 && request.revision < compacted_) return refused::kCompacted;
    return std::nullopt;
  }

  template <class Request>
  MaybeRefusal refuse_any(const Branch& branch) const {
    auto inner = branch.inner.begin();
    for (const Op& op : *branch.ops) {
      MaybeRefusal refusal;
      if (auto* request = std::get_if<Request>(&op.request)) refusal = refuse(*request);
      if (op.request.index() == 3) refusal = refuse_any<Request>(*inner++);
      if (refusal) return refusal;
    }
    return std::nullopt;
  }

  bool holds(const Compare& compare) const {
    const auto kvs = select(compare.key, compare.range_end, revision_);
    if (kvs.empty()) {
      return compare.target != Compare::Target::Value && compares(KeyValue(), compare);
    }
    return std::all_of(kvs.begin(), kvs.end(),
                       [&](const KeyValue* kv) { return compares(*kv, compare); });
  }

  Branch choose(const Txn& txn) const {
    const bool succeeded = std::all_of(txn.compare.begin(), txn.compare.end(),
                                       [this](const Compare& compare) { return holds(compare); });
    Branch branch{succeeded, succeeded ? &txn.success : &txn.failure, {}};
    for (const Op& op : *branch.ops) {
      auto* inner = std::get_if<TxnPtr>(&op.request);
      if (inner) branch.inner.push_back(choose(**inner));
    }
    return branch;
  }

  TxnResponse apply(const Branch& branch) {
    TxnResponse response;
    response.succeeded = branch.succeeded;
    auto inner = branch.inner.begin();
    for (const Op& op : *branch.ops) {
      const auto apply_op = [&](const auto& request) -> OpResponse {
        using Request = std::decay_t<decltype(request)>;
        if constexpr (std::is_same_v<Request, TxnPtr>) {
          return std::make_shared<const TxnResponse>(apply(*inner++));
        } else {
          return apply(request);
        }
      };
      response.responses.push_back(std::visit(apply_op, op.request));
    }
    response.revision = head();
    return response;
  }

  std::int64_t revision_{1};
  std::int64_t compacted_{-1};
  std::map<std::string, History> keys_;
  std::deque<Change> changes_;
  std::map<std::int64_t, LeaseRecord> leases_;
  std::set<std::pair<TimePoint, std::int64_t>> expiries_;
  std::int64_t next_lease_{7587870000000000001};
};

/// Users, their passwords and their tokens.
struct Accounts {
  struct User {
    std::string password;
    std::string prefix;  // of the keys that are his
    bool root{false};
  };

  bool on{false};
  std::map<std::string, User> users;
  std::map<std::string, std::string> tokens;  // token -> name
  std::int64_t issued{0};
};

/// Whom a request comes from, and what he may do: by the rules of etcd 3.5.30, which are the
/// strictest. Without authentication anybody may do anything.
class Caller {
 public:
  Caller(const Mvcc& mvcc, const Accounts::User* user) : mvcc_(&mvcc), user_(user) {}

  bool may(const std::string& key, const std::string& range_end) const {
    if (is_root()) return true;
    const std::string all(1, '\0');
    const std::string limit = prefix_range_end(user_->prefix);
    if (key.compare(0, user_->prefix.size(), user_->prefix) != 0) return false;
    return range_end.empty() || limit == all || (range_end != all && range_end <= limit);
  }

  bool may(const RangeRequest& request) const { return may(request.key, request.range_end); }
  bool may(const RemoveRequest& request) const { return may(request.key, request.range_end); }
  bool may(const PutRequest& request) const {
    return may(request.key, "") && may_touch(request.lease);
  }

  bool may(const TxnPtr& txn) const { return may(*txn); }
  bool may(const Txn& txn) const {
    const auto range = [this](const Compare& c) { return may(c.key, c.range_end); };
    const auto request = [this](const auto& r) { return may(r); };
    const auto op = [&](const Op& o) { return std::visit(request, o.request); };
    return std::all_of(txn.compare.begin(), txn.compare.end(), range) &&
           std::all_of(txn.success.begin(), txn.success.end(), op) &&
           std::all_of(txn.failure.begin(), txn.failure.end(), op);
  }

  bool may(const GrantRequest&) const { return true; }
  bool may(const RevokeRequest& request) const { return may_touch(request.id); }
  bool may(const KeepAliveRequest& request) const { return may_touch(request.id); }
  bool may(const TimeToLiveRequest& request) const {
    return !request.keys || may_touch(request.id);
  }

  /// Compaction, leases and status.
  template <class Request>
  bool may(const Request&) const {
    return is_root();
  }

 private:
  bool is_root() const { return !user_ || user_->root; }
  bool may_touch(std::int64_t lease) const {
    const std::set<std::string> keys = mvcc_->keys_of(lease);
    return std::all_of(keys.begin(), keys.end(), [this](const auto& key) { return may(key, ""); });
  }

  const Mvcc* mvcc_;
  const Accounts::User* user_;
};

enum class StreamEnd { None, Clean, MidLine, Lost };

/// An open watch request; it lives on the stack of the thread that serves it.
struct WatchStream {
  const HttpRequest& request;
  const ChunkSink& sink;
  const Context& ctx;
  std::condition_variable wake{};
  std::deque<StreamLine> lines{};                    // still to be sent
  std::map<std::int64_t, std::uint64_t> watchers{};  // watch id -> number in the Store
  std::int64_t next_id{0};
  StreamEnd end{StreamEnd::None};
  bool is_sending{false};
};

struct Watcher {
  WatchStream* stream;
  WatchCreate request;  // start_revision: the first that it has not been sent
};

/// What shall go wrong; see MemoryEtcd.
struct Faults {
  using Counts = std::map<std::string, int>;  // by path; "" = any
  Counts fail_next;
  Counts drop_replies;
  Counts no_leader;
  std::map<std::int64_t, bool> by_number;  // true: applied
  milliseconds delay{0};
  std::set<std::string> partitioned;  // endpoints; "" = all
};

/// Without the scheme.
COORDINATION_API std::string bare_endpoint(const std::string& endpoint) {
  const auto scheme = endpoint.find("://");
  return scheme == std::string::npos ? endpoint : endpoint.substr(scheme + 3);
}

COORDINATION_API Error refused_error(const HttpRequest& request) {
  return {ErrorCode::Connection, "cannot reach " + request.endpoint, "Connection refused"};
}

COORDINATION_API Error lost_error(const HttpRequest& request) {
  return {ErrorCode::Connection, "lost the connection to " + request.endpoint,
          "Connection reset by peer", Outcome::MaybeApplied};
}

COORDINATION_API Error ended_error(const Context& ctx, const HttpRequest& request,
                                   Outcome outcome) {
  return context_error(ctx, "no answer from " + request.endpoint, "", outcome);
}

COORDINATION_API HttpResponse no_leader_response(const HttpRequest& request) {
  const bool stream = request.path == "/v3/watch" || request.path == "/v3/lease/keepalive";
  return {refused::kNoLeader.status,
          stream ? error_line(refused::kNoLeader) : error_body(refused::kNoLeader)};
}

COORDINATION_API const std::string* find_header(const HttpRequest& request, const char* name) {
  for (const auto& header : request.headers) {
    if (header.first == name) return &header.second;
  }
  return nullptr;
}

/// Not so if a member answers from what it knows by itself.
COORDINATION_API bool needs_leader(const HttpRequest& request) {
  if (find_header(request, "Grpc-Metadata-hasleader")) return true;
  const std::string& path = request.path;
  if (path == "/v3/kv/range") {
    const auto range = decode_body<RangeRequest>(request.body);
    return !range || !range->serializable;
  }
  return path != "/v3/watch" && path != "/v3/lease/leases" && path != "/v3/maintenance/status";
}

/// Gives the body of a good answer to the sink, if there is one.
COORDINATION_API HttpResponse deliver(HttpResponse response, const ChunkSink& sink) {
  if (!sink || response.status != 200) return response;
  if (!response.body.empty()) sink(response.body);
  return {response.status, ""};
}

/// Waits for as long as answers are delayed; an Error if the caller's patience ends before.
COORDINATION_API std::optional<Error> linger(milliseconds delay, const HttpRequest& request,
                                             const Context& ctx) {
  if (delay.count() <= 0) return std::nullopt;
  const bool idle = request.idle_timeout.count() > 0 && request.idle_timeout < delay;
  if (!pause(ctx, idle ? request.idle_timeout : delay)) {
    return ended_error(ctx, request, Outcome::MaybeApplied);
  }

  if (idle) return lost_error(request);
  return std::nullopt;
}

/// Whether a watcher is to be told of a change.
COORDINATION_API bool wants(const WatchCreate& watch, const Change& change) {
  const bool filtered = change.kv->version == 0 ? watch.no_delete : watch.no_put;
  return !filtered && change.kv->mod_revision >= watch.start_revision &&
         in_range(change.kv->key, watch.key, watch.range_end);
}

/// The etcd behind any number of MemoryEtcd's callers.
class Store {
 public:
  explicit Store(std::shared_ptr<Clock> clock) : clock_(std::move(clock)) {}

  Result<HttpResponse> serve(const HttpRequest& request, const ChunkSink& sink,
                             const Context& ctx) {
    if (ctx.done()) return ended_error(ctx, request, Outcome::NotApplied);
    if (request.path == "/v3/watch") return serve_watch(request, sink, ctx);
    HttpResponse response;
    Fate fate;
    milliseconds delay;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      settle();
      fate = next_fate(request);
      delay = faults_.delay;
      if (fate == Fate::Refuse) return refused_error(request);
      response = fate == Fate::NoLeader ? no_leader_response(request) : answer(request);
      publish();
    }
    if (auto error = linger(delay, request, ctx)) return *std::move(error);
    if (fate == Fate::DropReply) return lost_error(request);
    return deliver(std::move(response), sink);
  }

  /// Runs `action` while nothing else does, with all leases gone that have run out.
  template <class Action>
  auto with(Action action) {
    const std::lock_guard<std::mutex> lock(mutex_);
    settle();
    return action(*this);
  }

  /// After a jump of time: waits until all have heard of what it has changed; of streams that are
  /// not read, once for two seconds.
  void catch_up() {
    UniqueLock lock(mutex_);
    settle();
    const auto is_idle = [](const WatchStream* stream) {
      return stream->end != StreamEnd::None || (stream->lines.empty() && !stream->is_sending);
    };
    const auto ready = [&] { return std::all_of(streams_.begin(), streams_.end(), is_idle); };
    stuck_ = !delivered_.wait_for(lock, milliseconds(stuck_ ? 0 : 2000), ready);
  }
  Clock::time_point next_expiry() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return mvcc_.next_expiry();
  }

  // For use inside with():
  Mvcc& mvcc() { return mvcc_; }
  Accounts& accounts() { return accounts_; }
  Faults& faults() { return faults_; }
  std::int64_t requests() const { return requests_; }
  std::uint64_t& cluster_id() { return cluster_id_; }
  std::shared_ptr<ManualClock>& manual_clock() { return manual_clock_; }
  /// Tells the watchers what has changed: of each revision one line to each.
  void publish() {
    if (published_ == mvcc_.revision()) return;
    std::map<std::pair<std::int64_t, std::uint64_t>, StreamLine> lines;
    const auto offer = [&](std::uint64_t number, const Change& change) {
      const WatchCreate& watch = watchers_.at(number).request;
      if (!wants(watch, change)) return;
      StreamLine& line = lines[{change.kv->mod_revision, number}];
      line.revision = change.kv->mod_revision;
      line.watch_id = watch.id;
      line.prev_kv = watch.prev_kv;
      line.changes.push_back(change);
    };
    mvcc_.changes_since(published_ + 1, [&](const Change& change) {
      const auto of_key = watchers_of_key_.find(change.kv->key);
      if (of_key != watchers_of_key_.end()) {
        for (const std::uint64_t number : of_key->second) offer(number, change);
      }
      for (const std::uint64_t number : watchers_of_ranges_) offer(number, change);
    });
    published_ = mvcc_.revision();
    for (auto& [key, line] : lines) {
      WatchStream& stream = *watchers_.at(key.second).stream;
      stream.lines.push_back(std::move(line));
      stream.wake.notify_all();
    }
  }

  void restart_empty() {
    end_streams(StreamEnd::Lost, "");
    mvcc_ = Mvcc();
    accounts_ = Accounts();
    published_ = mvcc_.revision();
  }

  /// Ends the streams of one endpoint, or of all.
  void end_streams(StreamEnd end, const std::string& endpoint) {
    for (WatchStream* stream : streams_) {
      if (!endpoint.empty() && bare_endpoint(stream->request.endpoint) != endpoint) continue;
      if (stream->end == StreamEnd::None) stream->end = end;
      stream->wake.notify_all();
    }
  }

  std::shared_ptr<Clock> clock() const { return clock_; }

 private:
  enum class Fate { Serve, Refuse, DropReply, NoLeader };
  using UniqueLock = std::unique_lock<std::mutex>;

  void settle() {
    mvcc_.expire(clock_->now());
    publish();
  }

  Fate next_fate(const HttpRequest& request) {
    const auto take = [&](Faults::Counts& counts) {
      for (const auto& path : {request.path, std::string()}) {
        auto it = counts.find(path);
        if (it != counts.end() && it->second > 0) return it->second-- > 0;
      }
      return false;
    };
    ++requests_;
    const auto& partitioned = faults_.partitioned;
    if (partitioned.count("") + partitioned.count(bare_endpoint(request.endpoint)) != 0) {
      return Fate::Refuse;
    }
    const auto it = faults_.by_number.find(requests_);
    if (it != faults_.by_number.end()) return it->second ? Fate::DropReply : Fate::Refuse;
    if (take(faults_.fail_next)) return Fate::Refuse;
    if (take(faults_.drop_replies)) return Fate::DropReply;
    if (take(faults_.no_leader) && needs_leader(request)) return Fate::NoLeader;
    return Fate::Serve;
  }

  HttpResponse answer(const HttpRequest& request) {
    using Handler = HttpResponse (Store::*)(const HttpRequest&);
    static constexpr std::pair<const char*, Handler> kRoutes[] = {
        {"/v3/kv/range", &Store::route<RangeRequest>},
        {"/v3/kv/put", &Store::route<PutRequest>},
        {"/v3/kv/deleterange", &Store::route<RemoveRequest>},
        {"/v3/kv/txn", &Store::route<Txn>},
        {"/v3/kv/compaction", &Store::route<CompactRequest>},
        {"/v3/lease/grant", &Store::route<GrantRequest>},
        {"/v3/lease/revoke", &Store::route<RevokeRequest>},
        {"/v3/lease/timetolive", &Store::route<TimeToLiveRequest>},
        {"/v3/lease/leases", &Store::route<LeasesRequest>},
        {"/v3/lease/keepalive", &Store::keep_alive},
        {"/v3/auth/authenticate", &Store::route<LoginRequest>},
        {"/v3/maintenance/status", &Store::route<StatusRequest>}};
    const auto* it = std::find_if(std::begin(kRoutes), std::end(kRoutes),
                                  [&](const auto& route) { return route.first == request.path; });
    if (it == std::end(kRoutes)) return {404, error_body(refused::kNotFound)};
    return (this->*it->second)(request);
  }

  template <class Request>
  HttpResponse route(const HttpRequest& request) {
    const auto respond = [](const Refusal& refusal) {
      return HttpResponse{refusal.status, error_body(refusal)};
    };
    // etcd's limits are on its own encoding, which is about as long as the bytes in base64.
    const std::size_t size = request.body.size() / 4 * 3;
    if (size > 2u << 20) return respond(refused::kFarTooLarge);
    if (size > 3u << 19) return respond(refused::kTooLarge);
    const auto body = decode_body<Request>(request.body);
    if (!body) return respond(refused::kBadJson);
    if (const MaybeRefusal refusal = refuse(request, *body)) return respond(*refusal);
    const auto reply = handle(*body);
    if (reply.refusal) return respond(*reply.refusal);
    return {200, write_body(cluster_id_, *reply.value)};
  }

  HttpResponse keep_alive(const HttpRequest& request) {
    HttpResponse response{200, ""};
    for (const auto& body : decode_stream<KeepAliveRequest>(request.body)) {
      if (const MaybeRefusal refusal = refuse(request, body)) {
        if (response.body.empty()) response.status = refusal->status;
        response.body += error_line(*refusal);
        break;
      }
      response.body += write_line(cluster_id_, mvcc_.keep_alive(body.id, clock_->now()));
    }
    return response;
  }

  /// etcd's order: what is wrong in itself, then the token, then the permission.
  template <class Request>
  MaybeRefusal refuse(const HttpRequest& request, const Request& body) const {
    if (const MaybeRefusal refusal = check(body)) return refusal;
    if (std::is_same_v<Request, LoginRequest>) return std::nullopt;
    const Answer<Caller> caller = identify(request);
    if (caller.refusal) return caller.refusal;
    return caller.value->may(body) ? std::nullopt : MaybeRefusal(refused::kDenied);
  }

  Answer<Caller> identify(const HttpRequest& request) const {
    if (!accounts_.on) return Caller(mvcc_, nullptr);
    const std::string* shown = find_header(request, "Authorization");
    if (!shown) return refused::kEmptyUser;
    const auto token = accounts_.tokens.find(*shown);
    if (token == accounts_.tokens.end()) return refused::kBadToken;
    return Caller(mvcc_, &accounts_.users.at(token->second));
  }

  Answer<RangeResponse> handle(const RangeRequest& request) { return mvcc_.range(request); }
  Answer<PutResponse> handle(const PutRequest& request) { return mvcc_.put(request); }
  Answer<RemoveResponse> handle(const RemoveRequest& request) { return mvcc_.remove(request); }
  Answer<TxnResponse> handle(const Txn& request) { return mvcc_.commit(request); }
  Answer<EmptyResponse> handle(const CompactRequest& request) {
    return mvcc_.compact(request.revision);
  }

  Answer<LeaseResponse> handle(const GrantRequest& request) {
    const auto before = mvcc_.next_expiry();
    auto reply = mvcc_.grant(request, clock_->now());
    if (mvcc_.next_expiry() < before) {  // the streams sleep until then
      for (WatchStream* stream : streams_) stream->wake.notify_all();
    }
    return reply;
  }

  Answer<EmptyResponse> handle(const RevokeRequest& request) { return mvcc_.revoke(request.id); }
  Answer<LeaseResponse> handle(const TimeToLiveRequest& request) {
    return mvcc_.time_to_live(request, clock_->now());
  }

  Answer<LeasesResponse> handle(const LeasesRequest&) {
    return LeasesResponse{mvcc_.revision(), mvcc_.leases()};
  }

  Answer<Status> handle(const StatusRequest&) {
    Status status;
    status.version = "3.5.30";
    status.db_size = 20480;
    status.leader = 1;
    status.raft_term = 2;
    status.revision = mvcc_.revision();
    return status;
  }

  Answer<LoginResponse> handle(const LoginRequest& request) {
    if (!accounts_.on) return refused::kAuthIsOff;
    const auto user = accounts_.users.find(request.name);
    if (user == accounts_.users.end() || user->second.password != request.password) {
      return refused::kWrongPassword;
    }
    const std::string token = "memory." + std::to_string(++accounts_.issued);
    accounts_.tokens[token] = request.name;
    return LoginResponse{mvcc_.revision(), token};
  }

  Result<HttpResponse> serve_watch(const HttpRequest& request, const ChunkSink& sink,
                                   const Context& ctx) {
    WatchStream stream{request, sink, ctx};
    const auto hook = ctx.on_cancel([&] {
      const std::lock_guard<std::mutex> lock(mutex_);
      stream.wake.notify_all();
    });
    UniqueLock lock(mutex_);
    settle();
    switch (next_fate(request)) {
      case Fate::Refuse: return refused_error(request);
      case Fate::DropReply: return lost_error(request);
      case Fate::NoLeader: return no_leader_response(request);
      case Fate::Serve: break;
    }
    open(stream);
    auto result = pump(stream, lock);
    close(stream);
    return result;
  }

  void open(WatchStream& stream) {
    streams_.insert(&stream);
    for (auto& order : decode_stream<WatchOrder>(stream.request.body)) {
      if (order.create) create(stream, *std::move(order.create));
      if (order.cancel) cancel(stream, *order.cancel);
      if (order.progress && !stream.watchers.empty()) {
        stream.lines.push_back({mvcc_.revision(), -1});
      }
    }
  }

  void create(WatchStream& stream, WatchCreate create) {
    if (create.key.empty()) create.key = std::string(1, '\0');
    StreamLine line;
    line.revision = mvcc_.revision();
    line.created = true;
    if (auto reason = refuse_watch(stream, create)) {
      line.watch_id = -1;
      line.canceled = true;
      line.reason = *std::move(reason);
      return stream.lines.push_back(std::move(line));
    }
    while (create.id == 0 && stream.watchers.count(stream.next_id) != 0) ++stream.next_id;
    if (create.id == 0) create.id = stream.next_id++;
    line.watch_id = create.id;
    stream.lines.push_back(line);
    if (create.start_revision != 0 && create.start_revision < mvcc_.compacted()) {
      line = {};  // the end has no revision
      line.watch_id = create.id;
      line.canceled = true;
      line.compact_revision = mvcc_.compacted();
      return stream.lines.push_back(std::move(line));
    }
    if (create.start_revision == 0) create.start_revision = mvcc_.revision() + 1;
    const std::uint64_t number = ++next_watcher_;
    stream.watchers[create.id] = number;
    (create.range_end.empty() ? watchers_of_key_[create.key] : watchers_of_ranges_).insert(number);
    const Watcher watcher{&stream, std::move(create)};
    replay(watchers_.emplace(number, watcher).first->second);
  }

  /// Why a watch cannot be, in etcd's words.
  std::optional<std::string> refuse_watch(const WatchStream& stream,
                                          const WatchCreate& create) const {
    const Answer<Caller> caller = identify(stream.request);
    if (caller.refusal) return watch_reason(*caller.refusal);
    if (!caller.value->may(create.key, create.range_end)) return watch_reason(refused::kDenied);
    const bool whole = create.range_end.empty() || create.range_end == std::string(1, '\0');
    if (!whole && create.range_end <= create.key) return "mvcc: watcher range is empty";
    if (create.start_revision < 0) return refused::kCompacted.message;
    if (create.id != 0 && stream.watchers.count(create.id) != 0) {
      return "mvcc: duplicate watch ID provided on the WatchStream";
    }
    return std::nullopt;
  }

  /// Sends what has happened since the start revision, in lines of at most 1000 revisions.
  void replay(const Watcher& watcher) {
    constexpr int kMaxRevisions = 1000;
    const WatchCreate& watch = watcher.request;
    StreamLine line;
    line.revision = mvcc_.revision();
    line.watch_id = watch.id;
    line.prev_kv = watch.prev_kv;
    int revisions = 0;
    std::int64_t last = 0;
    mvcc_.changes_since(watch.start_revision, [&](const Change& change) {
      if (!wants(watch, change)) return;
      if (change.kv->mod_revision != last && ++revisions > kMaxRevisions) {
        watcher.stream->lines.push_back(line);
        line.changes.clear();
        revisions = 1;
      }
      last = change.kv->mod_revision;
      line.changes.push_back(change);
    });
    if (!line.changes.empty()) watcher.stream->lines.push_back(std::move(line));
  }

  void cancel(WatchStream& stream, std::int64_t id) {
    const auto it = stream.watchers.find(id);
    if (it == stream.watchers.end()) return;
    forget(it->second);
    stream.watchers.erase(it);
    StreamLine line;
    line.revision = mvcc_.revision();
    line.watch_id = id;
    line.canceled = true;
    stream.lines.push_back(std::move(line));
  }

  void forget(std::uint64_t number) {
    const std::string& key = watchers_.at(number).request.key;
    const auto of_key = watchers_of_key_.find(key);
    if (of_key != watchers_of_key_.end() && of_key->second.erase(number) != 0 &&
        of_key->second.empty()) {
      watchers_of_key_.erase(of_key);
    }
    watchers_of_ranges_.erase(number);
    watchers_.erase(number);
  }

  void close(WatchStream& stream) {
    for (const auto& watcher : stream.watchers) forget(watcher.second);
    streams_.erase(&stream);
    delivered_.notify_all();
  }

  /// Sends lines until the stream ends.
  Result<HttpResponse> pump(WatchStream& stream, UniqueLock& lock) {
    const HttpRequest& request = stream.request;
    const auto idle_limit = [&request] {
      const bool limited = request.idle_timeout.count() > 0;
      return limited ? steady_clock::now() + request.idle_timeout : (SteadyTime::max)();
    };
    SteadyTime idle_until = idle_limit();
    while (stream.end == StreamEnd::None) {
      if (stream.ctx.done()) return ended_error(stream.ctx, request, Outcome::MaybeApplied);
      if (stream.lines.empty()) {
        if (steady_clock::now() >= idle_until) return lost_error(request);
        stream.wake.wait_until(lock, wake_time(stream, idle_until));
        settle();
        continue;
      }
      std::string text;
      for (const auto& line : std::exchange(stream.lines, {})) {
        text += write_line(cluster_id_, line);
      }
      const milliseconds delay = faults_.delay;
      stream.is_sending = true;
      lock.unlock();
      auto error = linger(delay, request, stream.ctx);
      const bool go_on = error || !stream.sink || stream.sink(text);
      lock.lock();
      stream.is_sending = false;
      delivered_.notify_all();
      if (error) return *std::move(error);
      if (!go_on) return HttpResponse{200, ""};
      idle_until = idle_limit();
    }
    return finish(stream, lock);
  }

  /// When to look again though nothing has come: a lease runs out, or the caller waits no longer.
  SteadyTime wake_time(const WatchStream& stream, SteadyTime limit) const {
    const SteadyTime now = steady_clock::now();
    limit = (std::min)({limit, stream.ctx.deadline().value_or(limit), now + std::chrono::hours(1)});
    const auto expiry = mvcc_.next_expiry();
    return expiry == (Mvcc::TimePoint::max)() ? limit
                                              : (std::min)(limit, now + (expiry - clock_->now()));
  }

  /// The last words of a stream that was ended from outside.
  Result<HttpResponse> finish(WatchStream& stream, UniqueLock& lock) {
    if (stream.end == StreamEnd::Clean) return HttpResponse{200, ""};
    if (stream.end == StreamEnd::MidLine && stream.sink) {
      if (stream.lines.empty()) stream.lines.push_back({mvcc_.revision(), -1});
      const std::string line = write_line(cluster_id_, stream.lines.front());
      lock.unlock();
      stream.sink(std::string_view{line}.substr(0, line.size() / 2));
      lock.lock();
    }
    return lost_error(stream.request);
  }

  const std::shared_ptr<Clock> clock_;
  std::shared_ptr<ManualClock> manual_clock_;  // the same as clock_, or null
  std::mutex mutex_;  // guards all below; never held while a sink or a Context is called
  Mvcc mvcc_;
  Accounts accounts_;
  Faults faults_;
  std::uint64_t cluster_id_{random_number() | 1};
  std::int64_t requests_{0};
  std::int64_t published_{1};  // the revision that watchers have been told of
  std::set<WatchStream*> streams_;
  std::condition_variable delivered_;
  bool stuck_{false};                          // catch_up() was in vain
  std::map<std::uint64_t, Watcher> watchers_;  // by number, in the order of creation
  std::map<std::string, std::set<std::uint64_t>> watchers_of_key_;
  std::set<std::uint64_t> watchers_of_ranges_;
  std::uint64_t next_watcher_{0};
};

}  // namespace detail::memory

class detail::MemoryStore : public memory::Store {
 public:
  using Store::Store;
};

COORDINATION_API MemoryEtcd::MemoryEtcd() : MemoryEtcd(std::make_shared<detail::SteadyClock>()) {}

COORDINATION_API MemoryEtcd::MemoryEtcd(std::shared_ptr<Clock> clock)
    : store_(std::make_shared<detail::MemoryStore>(clock)) {
  const std::weak_ptr<detail::MemoryStore> weak = store_;
  clock->on_jump([weak] {
    const auto store = weak.lock();
    if (store) store->catch_up();
    return store != nullptr;
  });
  clock->on_due([weak] {
    const auto store = weak.lock();
    return store ? std::optional<Clock::time_point>(store->next_expiry()) : std::nullopt;
  });
}

COORDINATION_API std::shared_ptr<MemoryEtcd> MemoryEtcd::manual_clock() {
  const auto clock = std::make_shared<ManualClock>();
  auto etcd = std::make_shared<MemoryEtcd>(clock);
  etcd->store_->with([&](auto& store) { store.manual_clock() = clock; });
  return etcd;
}

COORDINATION_API std::shared_ptr<Clock> MemoryEtcd::clock() const { return store_->clock(); }

COORDINATION_API void MemoryEtcd::advance(milliseconds by) {
  const auto clock = store_->with([](auto& store) { return store.manual_clock(); });
  if (clock) clock->advance(by);
}

COORDINATION_API void MemoryEtcd::fail_next(int n, const std::string& path) {
  store_->with([&](auto& store) { store.faults().fail_next[path] = n; });
}

COORDINATION_API void MemoryEtcd::drop_replies(int n, const std::string& path) {
  store_->with([&](auto& store) { store.faults().drop_replies[path] = n; });
}

COORDINATION_API void MemoryEtcd::fail_request(std::int64_t number, bool applied) {
  store_->with([&](auto& store) { store.faults().by_number[number] = applied; });
}

COORDINATION_API void MemoryEtcd::no_leader(int n, const std::string& path) {
  store_->with([&](auto& store) { store.faults().no_leader[path] = n; });
}

COORDINATION_API void MemoryEtcd::delay(milliseconds by) {
  store_->with([&](auto& store) { store.faults().delay = by; });
}

COORDINATION_API void MemoryEtcd::cut_streams(bool mid_line) {
  const auto end = mid_line ? detail::memory::StreamEnd::MidLine : detail::memory::StreamEnd::Clean;
  store_->with([&](auto& store) { store.end_streams(end, ""); });
}

COORDINATION_API void MemoryEtcd::partition(const std::string& endpoint) {
  const std::string bare = detail::memory::bare_endpoint(endpoint);
  store_->with([&](auto& store) {
    store.faults().partitioned.insert(bare);
    store.end_streams(detail::memory::StreamEnd::Lost, bare);
  });
}

COORDINATION_API void MemoryEtcd::heal() {
  store_->with([](auto& store) { store.faults().partitioned.clear(); });
}

COORDINATION_API bool MemoryEtcd::expire_lease(std::int64_t id) {
  return store_->with([&](auto& store) {
    const bool found = !store.mvcc().revoke(id).refusal;
    store.publish();
    return found;
  });
}

COORDINATION_API void MemoryEtcd::invalidate_tokens() {
  store_->with([](auto& store) { store.accounts().tokens.clear(); });
}

COORDINATION_API void MemoryEtcd::compact() {
  store_->with(
      [](auto& store) { static_cast<void>(store.mvcc().compact(store.mvcc().revision())); });
}

COORDINATION_API void MemoryEtcd::restart_empty() {
  store_->with([](auto& store) { store.restart_empty(); });
}

COORDINATION_API void MemoryEtcd::set_cluster_id(std::uint64_t id) {
  store_->with([&](auto& store) { store.cluster_id() = id; });
}

COORDINATION_API void MemoryEtcd::enable_auth(const std::string& root_password) {
  add_user("root", root_password, "");
  store_->with(
      [&](auto& store) { store.accounts().on = store.accounts().users["root"].root = true; });
}

COORDINATION_API void MemoryEtcd::add_user(const std::string& name, const std::string& password,
                                           const std::string& prefix) {
  store_->with([&](auto& store) { store.accounts().users[name] = {password, prefix}; });
}

COORDINATION_API std::int64_t MemoryEtcd::requests() const {
  return store_->with([](auto& store) { return store.requests(); });
}

COORDINATION_API std::uint64_t MemoryEtcd::cluster_id() const {
  return store_->with([](auto& store) { return store.cluster_id(); });
}

COORDINATION_API std::int64_t MemoryEtcd::revision() const {
  return store_->with([](auto& store) { return store.mvcc().revision(); });
}

COORDINATION_API std::vector<std::int64_t> MemoryEtcd::leases() const {
  return store_->with([](auto& store) { return store.mvcc().leases(); });
}

COORDINATION_API std::vector<std::string> MemoryEtcd::keys() const {
  return store_->with([](auto& store) { return store.mvcc().keys(); });
}

COORDINATION_API Result<HttpResponse> MemoryEtcd::serve(const HttpRequest& request,
                                                        const ChunkSink& sink, const Context& ctx) {
  const auto store = store_;  // it outlives this object, should that be destroyed meanwhile
  return store->serve(request, sink, ctx);
}

COORDINATION_API void MemoryEtcd::shut_down() { partition(); }

COORDINATION_API Coordinator Coordinator::in_memory() {
  CoordinatorOptions options;
  options.transport = std::make_shared<MemoryEtcd>();
  return connect(std::move(options)).value();
}

#endif  // COORDINATION_MEMORY_ETCD

// == 15. Recipes ================================================================================

namespace detail {

COORDINATION_API std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

/// Digits, with a point among them or not: in no locale but C's. Negative if it is no number.
COORDINATION_API double plain_number(std::string_view text) {
  double value = 0, place = 0;  // of the next digit behind the point
  for (char c : text) {
    if (c == '.' && place > 0) return -1;
    place = c == '.' ? 1 : place * 10;
    if (c != '.') value = value * 10 + (c - '0');
  }
  return text.empty() || text == "." ? -1 : place > 0 ? value / place : value;
}

/// A duration as Go writes it ("1m30s", "1.5s", "200ms"); 0 if it is none.
COORDINATION_API milliseconds go_duration(std::string_view text) {
  static const std::map<std::string_view, double> kUnits{
      {"ms", 1}, {"s", 1000}, {"m", 60 * 1000}, {"h", 60 * 60 * 1000}};
  constexpr const char* kDigits = "0123456789.";
  double sum = 0;
  while (!text.empty()) {
    auto unit = (std::min)(text.find_first_not_of(kDigits), text.size());
    auto end = (std::min)(text.find_first_of(kDigits, unit), text.size());
    auto number = plain_number(text.substr(0, unit));
    auto factor = kUnits.find(text.substr(unit, end - unit));
    if (number < 0 || factor == kUnits.end()) return milliseconds(0);
    sum += number * factor->second;
    text.remove_prefix(end);
  }
  return milliseconds(static_cast<std::int64_t>((std::min)(sum, 1e15)));
}

COORDINATION_API std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts{""};
  for (char c : text) {
    if (c == separator) {
      parts.emplace_back();
    } else if (c != ' ') {
      parts.back() += c;
    }
  }
  return parts;
}

COORDINATION_API void login_from_env(CoordinatorOptions& options) {
  options.username = variable("ETCDCTL_USER");
  options.password = variable("ETCDCTL_PASSWORD");
  auto colon = options.username.find(':');
  if (!options.password.empty() || colon == std::string::npos) return;
  options.password = options.username.substr(colon + 1);
  options.username.resize(colon);
}

}  // namespace detail

COORDINATION_API CoordinatorOptions options_from_env() {
  CoordinatorOptions options;
  auto endpoints = detail::variable("ETCDCTL_ENDPOINTS");
  if (!endpoints.empty()) options.endpoints = detail::split(endpoints, ',');
  detail::login_from_env(options);
  options.tls.ca_file = detail::variable("ETCDCTL_CACERT");
  options.tls.cert_file = detail::variable("ETCDCTL_CERT");
  options.tls.key_file = detail::variable("ETCDCTL_KEY");
  auto insecure = detail::variable("ETCDCTL_INSECURE_SKIP_TLS_VERIFY");
  options.tls.verify_server = insecure.empty() || insecure == "false" || insecure == "0";
  auto timeout = detail::variable("ETCDCTL_COMMAND_TIMEOUT");
  if (!timeout.empty()) options.timeout = detail::go_duration(timeout);
  return options;
}

namespace detail {

/// Signals that end Contexts. Their handler may do next to nothing: it writes into a pipe, which a
/// thread reads. Never destroyed.
class Signals {
 public:
  void listen(std::vector<int> numbers, const Context& ctx) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!reading_ && !(reading_ = start())) return;
    for (int number : numbers) std::signal(number, on_signal);
    waiting_.push_back({std::move(numbers), ctx});
  }

 private:
  struct Waiting {
    std::vector<int> numbers;
    Context ctx;
    bool has(int number) const {
      return std::find(numbers.begin(), numbers.end(), number) != numbers.end();
    }
  };
  /// Where the handler writes: constants to begin with, since it may not wait for their making.
  struct Target {
    std::atomic<int> pipe{-1};
    std::atomic<int> process{0};  // this_process() may be late, right after a fork()
  };
  static Target& target() {
    static Target one;
    return one;
  }

  static void on_signal(int number) {
    const int before = errno;
    bool mine = target().process == process_id();  // and not the pipe of a parent
    bool told = mine && write_byte(target().pipe, static_cast<unsigned char>(number)) == 1;
    if (!told) {
      std::signal(number, SIG_DFL);
      std::raise(number);
    }
    errno = before;
  }

#if defined(_WIN32)
  static int process_id() { return _getpid(); }
  static int make_pipe(int* ends) { return _pipe(ends, 256, _O_BINARY | _O_NOINHERIT); }
  static int write_byte(int pipe, unsigned char byte) { return _write(pipe, &byte, 1); }
  static int read_byte(int pipe, unsigned char& byte) { return _read(pipe, &byte, 1); }
#else
  static int process_id() { return getpid(); }
  static int make_pipe(int* ends) {
    if (::pipe(ends) != 0) return -1;
    for (int i : {0, 1}) static_cast<void>(fcntl(ends[i], F_SETFD, FD_CLOEXEC));
    return 0;
  }
  static ssize_t write_byte(int pipe, unsigned char byte) { return ::write(pipe, &byte, 1); }
  static ssize_t read_byte(int pipe, unsigned char& byte) { return ::read(pipe, &byte, 1); }
#endif

  /// False: the system has no pipe or no thread to give.
  bool start() {
    std::array<int, 2> ends{};
    if (!made_ && make_pipe(ends.data()) != 0) return false;
    if (!std::exchange(made_, true)) pipe_ = ends[0], target().pipe = ends[1];
    target().process = process_id();
    return !guarded([this] { std::thread([this] { run(); }).detach(); });
  }

  void run() {
    unsigned char byte = 0;
    for (auto got = read_byte(pipe_, byte); got > 0 || errno == EINTR;
         got = read_byte(pipe_, byte)) {
      if (got > 0) end(byte);
    }
  }

  void end(int number) {
    std::unique_lock<std::mutex> lock(mutex_);
    std::vector<Waiting> ended;
    for (auto& one : std::exchange(waiting_, {})) {
      (one.has(number) ? ended : waiting_).push_back(std::move(one));
    }
    for (auto& one : ended) {
      for (int each : one.numbers) {
        bool needed = std::any_of(waiting_.begin(), waiting_.end(),
                                  [each](const auto& other) { return other.has(each); });
        if (!needed) std::signal(each, SIG_DFL);
      }
    }
    lock.unlock();
    for (auto& one : ended) one.ctx.cancel();
  }

  std::mutex mutex_;  // guards the rest
  std::vector<Waiting> waiting_;
  int pipe_{-1};
  bool made_{false}, reading_{false};
};

}  // namespace detail

COORDINATION_API Context Context::on_signals(std::initializer_list<int> signals) {
  Context ctx;
  detail::process_wide<detail::Signals>().listen(signals, ctx);
  return ctx;
}

COORDINATION_API Result<Slot> DistributedLock::lease_slot(std::string name, int count,
                                                          milliseconds ttl, Context ctx) {
  if (count <= 0) return detail::invalid("a number of " + std::to_string(count) + " slots");
  ctx = state_->client->bounded(ctx);
  const auto slots = static_cast<std::uint64_t>(count);
  const auto first = detail::random_number() % slots;  // so that many who begin seldom meet
  for (std::uint64_t i = 0; i < slots; ++i) {
    auto number = static_cast<int>((first + i) % slots);
    auto lock = try_acquire(name + "/" + std::to_string(number), ttl, ctx);
    if (lock) return Slot(std::move(*lock), number);
    if (lock.error().code != ErrorCode::Conflict) return lock.error();
  }
  return Error::make(ErrorCode::Conflict,
                     "all " + std::to_string(count) + " slots of " + name + " are taken");
}

namespace detail {

using Choice = std::vector<const ServiceInfo*>;

/// Those that fit; all where none does.
template <class Fits>
Choice preferred(Choice from, Fits fits) {
  Choice some;
  std::copy_if(from.begin(), from.end(), std::back_inserter(some), fits);
  return some.empty() ? from : some;
}

/// What may be picked.
COORDINATION_API Choice candidates(const std::vector<ServiceInfo>& services,
                                   const std::map<std::string, SteadyTime>& resting,
                                   const ServiceView::PickOptions& options) {
  Choice choice;
  choice.reserve(services.size());
  for (auto& service : services) {
    bool may = (!options.matches || options.matches(service)) &&
               (!options.weight || options.weight(service) > 0);
    if (may) choice.push_back(&service);
  }
  if (!resting.empty()) {
    choice = preferred(std::move(choice),
                       [&](const ServiceInfo* one) { return resting.count(one->id) == 0; });
  }
  if (options.zone.empty()) return choice;
  return preferred(std::move(choice), [&](const ServiceInfo* one) {
    auto zone = one->metadata.find("zone");
    return zone != one->metadata.end() && zone->second == options.zone;
  });
}

/// One of them, as often as its weight says.
COORDINATION_API const ServiceInfo& by_weight(
    const Choice& choice, const std::function<double(const ServiceInfo&)>& weight) {
  std::vector<double> ends;
  for (auto* one : choice) {
    auto least = ends.empty() ? 0.0 : ends.back();
    ends.push_back(least + std::clamp(weight(*one), 0.0, 1e100));
  }
  auto point = ends.back() * std::ldexp(static_cast<double>(random_number() >> 11), -53);
  auto at = std::upper_bound(ends.begin(), ends.end(), point) - ends.begin();
  return *choice[(std::min)(static_cast<std::size_t>(at), choice.size() - 1)];
}

/// Those of a view that rest now, and until when.
COORDINATION_API std::map<std::string, SteadyTime> resting_now(ViewCore& view) {
  auto now = view.client->clock->now();
  std::lock_guard<std::mutex> lock(view.decoding);
  for (auto it = view.resting.begin(); it != view.resting.end();) {
    it = it->second <= now ? view.resting.erase(it) : std::next(it);
  }
  return view.resting;
}

}  // namespace detail

COORDINATION_API Result<ServiceInfo> ServiceView::pick(Pick how) {
  PickOptions options;
  options.how = how;
  return pick(options);
}

COORDINATION_API Result<ServiceInfo> ServiceView::pick(
    std::function<bool(const ServiceInfo&)> matches) {
  PickOptions options;
  options.matches = std::move(matches);
  return pick(options);
}

COORDINATION_API Result<ServiceInfo> ServiceView::pick(const PickOptions& options) {
  auto services = detail::decoded_services(*core_);
  auto choice = detail::candidates(*services, detail::resting_now(*core_), options);
  if (choice.empty()) return core_->missing("no instance under " + core_->prefix);
  if (options.weight) return detail::by_weight(choice, options.weight);
  auto turn = options.how == Pick::Random ? detail::random_number() : core_->turn++;
  return *choice[turn % choice.size()];
}

COORDINATION_API void ServiceView::report_failure(const std::string& id, milliseconds rest) {
  auto until = core_->client->clock->now() + (std::min)(rest, detail::kLongest);
  std::lock_guard<std::mutex> lock(core_->decoding);
  core_->resting[id] = until;
}

COORDINATION_API Result<std::int64_t> ConfigCenter::update_with(
    std::string key, const std::function<Result<void>(nlohmann::json&)>& change, Context ctx) {
  ctx = state_->client->bounded(ctx);
  detail::Backoff backoff(milliseconds(5), milliseconds(500));
  while (true) {
    auto found = get_entry(key, ctx);
    bool missing = !found && found.error().code == ErrorCode::NotFound;
    if (!found && !missing) return found.error();
    auto seen = missing ? ConfigEntry{} : std::move(*found);
    auto value = seen.value;
    auto changed = change(value);
    if (!changed) return changed.error();
    if (value == seen.value) return seen.revision;
    auto written = compare_and_set(key, seen.revision, value, ctx);
    bool beaten = !written && written.error().code == ErrorCode::Conflict;
    if (!beaten) return written;
    if (!ctx.sleep_for(backoff.next())) {
      return detail::context_error(ctx, "the configuration " + key + " was not changed",
                                   "others were faster all the time");
    }
  }
}

namespace detail {

/// A pointer that is copied without a lock. Its readers are counted while they copy; what was
/// there before is kept until a writer sees none of them. Writers come one at a time.
template <class T>
class Published {
 public:
  explicit Published(std::shared_ptr<const T> first) { store(std::move(first)); }

  std::shared_ptr<const T> load() const {
    ++readers_;
    auto copy = *shown_.load();
    --readers_;
    return copy;
  }
  void store(std::shared_ptr<const T> next) {
    kept_.push_back(std::make_unique<const std::shared_ptr<const T>>(std::move(next)));
    shown_ = kept_.back().get();
    for (int i = 0; i < 100 && readers_ != 0; ++i) std::this_thread::yield();
    if (readers_ == 0) kept_.erase(kept_.begin(), kept_.end() - 1);
  }

 private:
  mutable std::atomic<int> readers_{0};
  std::atomic<const std::shared_ptr<const T>*> shown_{nullptr};
  std::vector<std::unique_ptr<const std::shared_ptr<const T>>> kept_;
};

/// A view of one key, and what was made of it last.
class LiveState {
 public:
  LiveState(ConfigView view, std::string key, std::shared_ptr<const void> initial,
            LiveDecode decode)
      : key_(std::move(key)), decode_(std::move(decode)),
        shown_(std::make_shared<const LiveValue>(LiveValue{std::move(initial)})),
        view_(std::move(view)) {}

  void begin() {
    refresh();
    on_change(nullptr);
    view_.on_end([this](const Error& error) { fail(error); });
  }

  std::shared_ptr<const LiveValue> shown() const { return shown_.load(); }
  const ConfigView& view() const { return view_; }

  void refresh() {
    std::lock_guard<std::mutex> lock(mutex_);
    auto entry = view_.get_entry(key_);
    if (!entry) return seen_ = 0, refuse(entry.error());
    if (std::exchange(seen_, entry->revision) == entry->revision) return;
    Result<std::shared_ptr<const void>> value(std::shared_ptr<const void>{});
    auto thrown = guarded([&] { value = decode_(entry->value); });
    if (thrown) value = make_error(ErrorCode::Validation, key_ + " was refused", *thrown);
    if (!value) return refuse(value.error());
    show({std::move(*value), entry->revision});
  }

  /// Each handler sees to it that it is told of the latest, whichever of them runs first. It may
  /// end this.
  void on_change(LiveHandler handler) {
    view_.on_change([this, handler = std::move(handler), told = shown()]() mutable {
      refresh();
      auto before = std::exchange(told, shown());
      bool changed = before->value != told->value;
      if (handler && changed) handler(before->value.get(), told->value.get());
    });
  }

 private:
  void show(LiveValue value) { shown_.store(std::make_shared<const LiveValue>(std::move(value))); }
  void refuse(const Error& error) {
    auto now = *shown();
    now.error = error;
    show(std::move(now));
  }
  void fail(const Error& error) {
    std::lock_guard<std::mutex> lock(mutex_);
    refuse(error);
  }

  const std::string key_;
  const LiveDecode decode_;
  std::mutex mutex_;      // one refreshes at a time
  std::int64_t seen_{0};  // the revision that was judged last
  Published<LiveValue> shown_;
  ConfigView view_;  // goes first, and with it the handlers
};

COORDINATION_API Result<std::shared_ptr<LiveState>> follow_config(
    ConfigCenter& config, std::string key, std::shared_ptr<const void> initial, LiveDecode decode,
    Context ctx) {
  auto valid = validate_key(key, "key");
  if (!valid) return valid.error();
  auto view = config.view(key, std::move(ctx));
  if (!view) return view.error();
  auto live = std::make_shared<LiveState>(std::move(*view), std::move(key), std::move(initial),
                                          std::move(decode));
  live->begin();
  return live;
}

COORDINATION_API std::shared_ptr<const LiveValue> live_value(const LiveState& live) {
  return live.shown();
}

COORDINATION_API void on_live_change(LiveState& live, LiveHandler handler) {
  live.on_change(std::move(handler));
}

COORDINATION_API Result<void> wait_for_live(LiveState& live, std::int64_t revision,
                                            const Context& ctx) {
  auto waited = live.view().wait_for(revision, ctx);
  if (waited) live.refresh();
  return waited;
}

COORDINATION_API const LiveView& live_view(const LiveState& live) { return live.view(); }

}  // namespace detail

}  // namespace v0
}  // namespace coordination

#endif  // COORDINATION_IMPLEMENTED
#endif  // COORDINATION_HEADER_ONLY || COORDINATION_IMPLEMENTATION

#pragma pop_macro("None")
#pragma pop_macro("Status")
#pragma pop_macro("Debug")
#pragma pop_macro("Info")
#pragma pop_macro("check")
#pragma pop_macro("verify")
#pragma pop_macro("delay")
