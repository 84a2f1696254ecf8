// A system that has no thread to give.
#pragma once

#include <pthread.h>

#include <cstdlib>

namespace support {

/// While this lives, the system has no thread to give: the stack of each would be larger than all
/// memory that can be addressed.
class NoThreads {
 public:
  NoThreads() {
    pthread_getattr_default_np(&before_);
    pthread_attr_t huge;
    pthread_attr_init(&huge);
    pthread_attr_setstacksize(&huge, std::size_t{1} << 48);
    if (pthread_setattr_default_np(&huge) != 0) std::abort();
    pthread_attr_destroy(&huge);
  }
  NoThreads(const NoThreads&) = delete;
  NoThreads& operator=(const NoThreads&) = delete;
  ~NoThreads() {
    pthread_setattr_default_np(&before_);
    pthread_attr_destroy(&before_);
  }

 private:
  pthread_attr_t before_{};
};

}  // namespace support
