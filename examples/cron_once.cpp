// cron_once [ENDPOINT [DATE]]: cron starts it on every machine, and one of them does the work of
// the day. Without arguments: three machines, two days, on an etcd in memory.
#include <coordination.hpp>
#include <cstdio>

using namespace coordination;
using namespace std::chrono_literals;

const char* const kDone = "/cron/nightly";  // the last date that was done

// Nobody's clock matters: what counts is which dates are done already.
Result<void> once(Coordinator& c, const std::string& date) {
  return c.lock().with_lock("cron/nightly", 30s, [&](Lock& lock) -> Result<void> {
    auto last = c.client().get(kDone);
    if (!last && last.error().code != ErrorCode::NotFound) return last.error();
    if (last && last->value >= date) {
      std::printf("%s was done already\n", date.c_str());
      return {};
    }
    std::printf("%s: the nightly work\n", date.c_str());
    auto written = lock.put(kDone, date);  // refused if the lock was lost meanwhile
    return written ? Result<void>() : written.error();
  });
}

int main(int argc, char** argv) try {
  Coordinator c = argc > 1 ? Coordinator::connect({{argv[1]}}).value() : Coordinator::in_memory();
  if (argc > 2) return once(c, argv[2]).value(), 0;
  for (const char* date : {"2031-05-07", "2031-05-08"}) {
    for (int machine = 1; machine <= 3; ++machine) once(c, date).value();
  }
  once(c, "2031-05-07").value();  // one whose clock is a day late
} catch (const std::exception& e) {
  std::printf("FAILED: %s\n", e.what());
  return 1;
}
