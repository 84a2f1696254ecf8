// live_config [ENDPOINT]: a typed value that follows its key, and keeps the last good one. Without
// an endpoint on an etcd in memory.
#include <coordination.hpp>
#include <cstdio>
#include <nlohmann/json.hpp>

using namespace coordination;
using namespace std::chrono_literals;

struct Limits {
  int rate{10};
  std::string mode{"strict"};
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Limits, rate, mode)

Result<void> usable(const Limits& limits) {
  if (limits.rate > 0) return {};
  return Error::make(ErrorCode::Validation, "rate must be positive");
}

int main(int argc, char** argv) try {
  Coordinator c = argc > 1 ? Coordinator::connect({{argv[1]}}).value() : Coordinator::in_memory();
  ConfigCenter& config = c.config();

  auto limits = LiveConfig<Limits>::follow(config, "examples/live", Limits{}, usable).value();
  limits.on_change([](const Limits& old, const Limits& now) {
    std::fprintf(stderr, "rate: %d, now %d\n", old.rate, now.rate);
  });

  auto show = [&] {
    auto now = limits.get();  // two members of one value; no request is sent, nothing is waited for
    auto error = limits.error();
    std::printf("%d, %s: %s\n", now->rate, now->mode.c_str(),
                error ? to_string(error->code) : "as it is in etcd");
  };
  show();
  for (const nlohmann::json& value :
       {nlohmann::json(Limits{100, "strict"}), nlohmann::json(Limits{-1, "lax"}),
        nlohmann::json("no limits"), nlohmann::json(Limits{200, "lax"})}) {
    auto revision = config.set("examples/live", value).value();
    limits.wait_for(revision).value();  // only since this program wants to see its own change
    show();
  }
  config.remove("examples/live").value();
  return limits->rate == 200 ? 0 : 1;
} catch (const std::exception& e) {
  std::printf("FAILED: %s\n", e.what());
  return 1;
}
