// Section 1: errors and results.
#include <doctest/doctest.h>

#include <memory>
#include <type_traits>

#include "coordination.hpp"

using namespace coordination;

namespace {

Error some_error() {
  return {ErrorCode::Conflict, "the lock was not acquired", "somebody else holds it",
          Outcome::MaybeApplied, 7};
}

struct NotDefault {
  explicit NotDefault(int n) : number(n) {}
  int number;
};

}  // namespace

TEST_CASE("errors: every code has its name") {
  const std::pair<ErrorCode, const char*> names[] = {
      {ErrorCode::Connection, "CONNECTION_ERROR"},
      {ErrorCode::Timeout, "TIMEOUT_ERROR"},
      {ErrorCode::NotFound, "NOT_FOUND"},
      {ErrorCode::Conflict, "CONFLICT"},
      {ErrorCode::Validation, "VALIDATION_ERROR"},
      {ErrorCode::Unavailable, "SERVICE_UNAVAILABLE"},
      {ErrorCode::Cancelled, "CANCELLED"},
      {ErrorCode::PermissionDenied, "PERMISSION_DENIED"},
      {ErrorCode::Lost, "LOST"},
      {ErrorCode::Compacted, "COMPACTED"},
      {ErrorCode::Internal, "INTERNAL_ERROR"}};
  for (const auto& [code, name] : names) CHECK(std::string(to_string(code)) == name);
  CHECK(std::string(to_string(static_cast<ErrorCode>(99))) == "INTERNAL_ERROR");
}

TEST_CASE("errors: the other enumerations have names, too") {
  CHECK(std::string(to_string(EventType::Put)) == "PUT");
  CHECK(std::string(to_string(EventType::Delete)) == "DELETE");
  CHECK(std::string(to_string(LogLevel::Debug)) == "DEBUG");
  CHECK(std::string(to_string(LogLevel::Info)) == "INFO");
  CHECK(std::string(to_string(LogLevel::Warn)) == "WARN");
  CHECK(std::string(to_string(LogLevel::Error)) == "ERROR");
  CHECK(std::string(to_string(RegistrationEvent::Registered)) == "REGISTERED");
  CHECK(std::string(to_string(RegistrationEvent::Lost)) == "LOST");
  CHECK(std::string(to_string(RegistrationEvent::Replaced)) == "REPLACED");
}

TEST_CASE("errors: an error as text") {
  CHECK(to_string(some_error()) == "[CONFLICT] the lock was not acquired: somebody else holds it");
  Error brief;
  brief.message = "nothing more";
  CHECK(to_string(brief) == "[INTERNAL_ERROR] nothing more");
  CHECK(brief.outcome == Outcome::NotApplied);
  CHECK(brief.revision == 0);
}

TEST_CASE("errors: a Result with a value") {
  Result<std::string> result = std::string("abc");
  CHECK(result.has_value());
  CHECK(static_cast<bool>(result));
  CHECK(*result == "abc");
  CHECK(result->size() == 3);
  CHECK(result.value() == "abc");
  CHECK(result.value_or("other") == "abc");
  result.value() += "d";
  CHECK(*result == "abcd");
  const Result<std::string>& constant = result;
  CHECK(*constant == "abcd");
  CHECK(constant.value() == "abcd");
  CHECK(constant->front() == 'a');
  CHECK(*std::move(result) == "abcd");
}

TEST_CASE("errors: a Result with an error") {
  Result<std::string> result = some_error();
  CHECK_FALSE(result.has_value());
  CHECK_FALSE(static_cast<bool>(result));
  CHECK(result.value_or("other") == "other");
  CHECK(Result<std::string>(some_error()).value_or("other") == "other");
  CHECK(result.error().code == ErrorCode::Conflict);
  CHECK(result.error().outcome == Outcome::MaybeApplied);
  CHECK(result.error().revision == 7);
  const Result<std::string> copy = result;
  CHECK(to_string(copy.error()) == to_string(some_error()));
}

TEST_CASE("errors: value() of an error throws a CoordinationError that has it all") {
  const auto check = [](const CoordinationError& e) {
    CHECK(e.code() == ErrorCode::Conflict);
    CHECK(e.error().message == "the lock was not acquired");
    CHECK(e.error().cause == "somebody else holds it");
    CHECK(e.error().outcome == Outcome::MaybeApplied);
    CHECK(std::string(e.what()) == to_string(some_error()));
  };
  int thrown = 0;
  const auto expect = [&](auto&& call) {
    try {
      call();
    } catch (const CoordinationError& e) {
      ++thrown;
      check(e);
    }
  };
  Result<int> result = some_error();
  const Result<int> constant = some_error();
  const Result<void> nothing = some_error();
  expect([&] { static_cast<void>(result.value()); });
  expect([&] { static_cast<void>(constant.value()); });
  expect([&] { static_cast<void>(Result<int>(some_error()).value()); });
  expect([&] { nothing.value(); });
  CHECK(thrown == 4);
}

TEST_CASE("errors: Result<void>") {
  const Result<void> good;
  CHECK(good.has_value());
  CHECK(static_cast<bool>(good));
  CHECK_NOTHROW(good.value());
  const Result<void> bad = some_error();
  CHECK_FALSE(bad.has_value());
  CHECK_FALSE(static_cast<bool>(bad));
  CHECK(bad.error().code == ErrorCode::Conflict);
}

TEST_CASE("errors: a Result holds what can only be moved, and what has no default") {
  Result<std::unique_ptr<int>> result = std::make_unique<int>(5);
  Result<std::unique_ptr<int>> moved = std::move(result);
  CHECK(**moved == 5);
  const std::unique_ptr<int> taken = std::move(moved).value();
  CHECK(*taken == 5);
  const Result<NotDefault> other = NotDefault(3);
  CHECK(other->number == 3);
  CHECK(Result<NotDefault>(some_error()).value_or(NotDefault(4)).number == 4);
}

TEST_CASE("errors: what a Result does not allow, and what it gives by value") {
  static_assert(!std::is_convertible_v<Result<int>, bool>, "no implicit bool");
  static_assert(!std::is_convertible_v<Result<void>, bool>, "no implicit bool");
  static_assert(std::is_constructible_v<bool, Result<int>>, "but an explicit one");
  using Numbers = std::vector<int>;
  static_assert(std::is_same_v<decltype(std::declval<Result<Numbers>>().value()), Numbers>,
                "a range-for over a temporary Result must be safe");
  int sum = 0;
  for (int n : Result<Numbers>(Numbers{1, 2, 3}).value()) sum += n;
  CHECK(sum == 6);
}

TEST_CASE("errors: which exceptions are ours") {
  const CoordinationError ours(some_error());
  const std::runtime_error theirs("something");
  const std::exception& as_base = ours;
  CHECK(is_coordination_error(as_base));
  CHECK(get_error_code(as_base) == ErrorCode::Conflict);
  CHECK_FALSE(is_coordination_error(theirs));
  CHECK(get_error_code(theirs) == ErrorCode::Internal);
}
