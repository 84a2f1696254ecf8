// feature_flags [ENDPOINT]: features that are switched on for a share of all users, while programs
// run. Without an endpoint on an etcd in memory.
#include <coordination.hpp>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>

using namespace coordination;

class Flags {
 public:
  explicit Flags(ConfigCenter& config)
      : percent_(LiveConfig<Percents>::follow(config, "examples/flags", {}).value()) {}

  // The same user always gets the same answer; no request is sent.
  bool on(const std::string& feature, const std::string& user) const {
    auto percents = percent_.get();
    auto found = percents->find(feature);
    return found != percents->end() && place(feature + "/" + user) < found->second;
  }
  void wait_for(std::int64_t revision) const { percent_.wait_for(revision).value(); }

 private:
  using Percents = std::map<std::string, unsigned>;
  static unsigned place(const std::string& text) {  // FNV-1a, 0 to 99
    std::uint32_t hash = 2166136261u;
    for (unsigned char c : text) hash = (hash ^ c) * 16777619u;
    return hash % 100;
  }
  LiveConfig<Percents> percent_;
};

int main(int argc, char** argv) try {
  Coordinator c = argc > 1 ? Coordinator::connect({{argv[1]}}).value() : Coordinator::in_memory();
  Flags flags(c.config());
  for (unsigned percent : {0u, 30u, 100u}) {
    // update() changes this flag and leaves the others as they are, whoever changes them meanwhile.
    auto revision = c.config().update("examples/flags",
                                      [&](nlohmann::json& all) { all["new-checkout"] = percent; });
    flags.wait_for(revision.value());
    int users = 0;
    for (int user = 0; user < 1000; ++user) {
      if (flags.on("new-checkout", "user-" + std::to_string(user))) ++users;
    }
    std::printf("%u %%: %d of 1000 users\n", percent, users);
  }
  c.config().remove("examples/flags").value();
  return flags.on("unknown", "anybody") ? 1 : 0;
} catch (const std::exception& e) {
  std::printf("FAILED: %s\n", e.what());
  return 1;
}
