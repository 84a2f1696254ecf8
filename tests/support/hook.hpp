// Functions of a test that others call, in any thread.
#pragma once

#include <doctest/doctest.h>

#include <functional>
#include <future>
#include <memory>
#include <type_traits>
#include <utility>

#include "coordination.hpp"
#include "wait.hpp"

namespace support {

/// Lets others call a function for as long as it lives: its destructor ends that, and waits for
/// those who are in it. What the function refers to is declared before this, as it has to be, and
/// so lives longer.
class [[nodiscard]] Hook {
 public:
  Hook(std::shared_ptr<void> function, std::future<void> gone)
      : function_(std::move(function)), gone_(std::move(gone)) {}
  Hook(Hook&&) noexcept = default;
  Hook& operator=(Hook&&) = delete;
  ~Hook() {
    function_.reset();
    if (!gone_.valid()) return;
    CHECK_MESSAGE(gone_.wait_for(lenient(30s)) == std::future_status::ready,
                  "a function of the test does not return");
  }

 private:
  std::shared_ptr<void> function_;
  std::future<void> gone_;
};

namespace detail {

/// What one hears who calls a function that is no more.
template <class R>
R too_late() {
  using coordination::Error;
  if constexpr (std::is_constructible_v<R, Error>) {
    return Error{coordination::ErrorCode::Connection, "the test is over", "",
                 coordination::Outcome::NotApplied, 0};
  } else {
    return R();
  }
}

}  // namespace detail

/// Gives `function` to `put`, as a Function that others may call. Returns the Hook that ends that;
/// or nothing, for a function that refers to nothing, and for a Function, which must own all that
/// it refers to.
template <class Function, class F, class Put>
auto hang_in(F function, Put put) {
  if constexpr (std::is_empty_v<F> || std::is_null_pointer_v<F> || std::is_same_v<F, Function>) {
    put(Function(std::move(function)));
  } else {
    auto gone = std::make_shared<std::promise<void>>();
    auto when_gone = gone->get_future();
    const auto drop = [gone](F* last) {
      delete last;
      gone->set_value();
    };
    const std::shared_ptr<F> owner(new F(std::move(function)), drop);
    using R = typename Function::result_type;
    put(Function([weak = std::weak_ptr<F>(owner)](auto&&... args) -> R {
      if (const auto mine = weak.lock()) return (*mine)(args...);
      return detail::too_late<R>();
    }));
    return Hook(owner, std::move(when_gone));
  }
}

}  // namespace support
