#include "signals.hpp"

namespace coordctl {

namespace {

constexpr int kStop = SIGURG;  // ends the thread; nobody sends it to a program by hand

bool is_ignored(int signal) {
  struct sigaction action {};
  return sigaction(signal, nullptr, &action) == 0 && action.sa_handler == SIG_IGN;
}

}  // namespace

void Inbox::push(Event event) {
  std::lock_guard<std::mutex> hold(mutex_);
  events_.push_back(std::move(event));
  changed_.notify_all();
}

std::optional<Event> Inbox::wait(std::optional<steady_clock::time_point> deadline) {
  std::unique_lock<std::mutex> hold(mutex_);
  const auto some = [this] { return !events_.empty(); };
  if (!deadline) {
    changed_.wait(hold, some);
  } else if (!changed_.wait_until(hold, *deadline, some)) {
    return std::nullopt;
  }
  Event event = std::move(events_.front());
  events_.pop_front();
  return event;
}

Signals::Signals(Inbox& inbox) {
  sigemptyset(&waited_);
  for (const int signal : {SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGALRM, SIGWINCH}) {
    if (!is_ignored(signal)) sigaddset(&waited_, signal);
  }
  if (is_ignored(SIGCHLD)) std::signal(SIGCHLD, SIG_DFL);  // else children leave no status
  sigaddset(&waited_, SIGCHLD);
  sigaddset(&waited_, kStop);
  sigset_t blocked = waited_;
  sigaddset(&blocked, SIGTTOU);  // the terminal is handed to the command, and taken back
  pthread_sigmask(SIG_BLOCK, &blocked, &before_);
  thread_ = std::thread([this, &inbox] { run(inbox); });
}

Signals::~Signals() {
  pthread_kill(thread_.native_handle(), kStop);
  thread_.join();
  pthread_sigmask(SIG_SETMASK, &before_, nullptr);
}

void Signals::run(Inbox& inbox) {
  for (int signal = 0; sigwait(&waited_, &signal) == 0 && signal != kStop;) {
    inbox.push({Event::Kind::Signal, signal});
  }
}

}  // namespace coordctl
