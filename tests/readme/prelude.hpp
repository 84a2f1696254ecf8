// What the README's fragments take for granted.
#include <coordination.hpp>
#include <nlohmann/json.hpp>
#include <thread>

using namespace coordination;
using namespace std::chrono_literals;

void print(const std::string& text);
bool shutdown_requested();
void stop_working(const Error& error);
void read_it_again();
void try_again_later();
void work(Lock& lock);

#define FRAGMENT_PARAMETERS                                     \
  [[maybe_unused]] Coordinator &c, [[maybe_unused]] Lock &lock, \
      [[maybe_unused]] const CoordinatorOptions &options,       \
      [[maybe_unused]] const std::string &password
