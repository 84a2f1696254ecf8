// What the README's fragments take for granted.
#include <coordination.hpp>
#include <csignal>
#include <nlohmann/json.hpp>
#include <thread>

using namespace coordination;
using namespace std::chrono_literals;

struct Limits {
  int rate;
  NLOHMANN_DEFINE_TYPE_INTRUSIVE(Limits, rate)
};
extern int used;

void print(const std::string& text);
bool ask(const ServiceInfo& service);
void count(const RequestEvent& event);
void read_it_again();
bool shutdown_requested();
void slow_down();
void stop_working(const Error& error);
void try_again_later();
void work(Lock& lock);
void work_as_leader(Leadership& leadership);

#define FRAGMENT_PARAMETERS                                     \
  [[maybe_unused]] Coordinator &c, [[maybe_unused]] Lock &lock, \
      [[maybe_unused]] const CoordinatorOptions &options,       \
      [[maybe_unused]] const std::string &password
