// http_service [ENDPOINT]: servers that register themselves, and a client that goes to each in turn
// and past one that is dead. Without an endpoint on an etcd in memory.
#include <httplib.h>

#include <coordination.hpp>
#include <cstdio>
#include <thread>

using namespace coordination;
using namespace std::chrono_literals;

struct Server {
  Server(Coordinator& c, const std::string& id) {
    http.Get("/hello", [id](const httplib::Request&, httplib::Response& response) {
      response.set_content("hello from " + id, "text/plain");
    });
    auto me =
        ServiceInfo::named("hello").with_id(id).at("127.0.0.1", http.bind_to_any_port("127.0.0.1"));
    me.ttl = 5s;  // how long the record outlives a process that dies
    thread = std::thread([this] { http.listen_after_bind(); });
    while (!http.is_running()) std::this_thread::sleep_for(1ms);
    c.registry().register_service(me).value();
  }
  ~Server() {
    http.stop();
    thread.join();
  }
  httplib::Server http;
  std::thread thread;
};

// Asks one instance; if it does not answer, that one rests for a while, and another one is asked.
std::string hello(ServiceView& services) {
  while (true) {
    ServiceInfo one = services.pick().value();  // NotFound: nobody is there
    httplib::Client http(one.address, one.port);
    http.set_connection_timeout(1);
    if (auto answer = http.Get("/hello")) return answer->body;
    std::printf("%s does not answer\n", one.id.c_str());
    services.report_failure(one.id, 30s);
  }
}

int main(int argc, char** argv) try {
  Coordinator c = argc > 1 ? Coordinator::connect({{argv[1]}}).value() : Coordinator::in_memory();
  Server a(c, "a"), b(c, "b");
  auto dead = ServiceInfo::named("hello").with_id("c").at("127.0.0.1", 9);
  auto revision = c.registry().register_service(dead).value();

  auto services = c.registry().view("hello").value();
  services.wait_for(revision).value();
  for (int i = 0; i < 6; ++i) std::printf("%s\n", hello(services).c_str());
} catch (const std::exception& e) {
  std::printf("FAILED: %s\n", e.what());
  return 1;
}
