// Certificates for tests, made by the openssl program.
#pragma once

#include <fstream>
#include <string>
#include <vector>

#include "process.hpp"

namespace support {

/// A CA, a server's and a client's certificate signed by it, and a CA that has signed neither.
class TlsFiles {
 public:
  TlsFiles() {
    make_ca("ca");
    make_ca("other-ca");
    // etcd's gateway shows the server's certificate to itself as a client.
    sign("server", "/CN=127.0.0.1",
         "subjectAltName=IP:127.0.0.1,IP:::1,DNS:localhost\n"
         "extendedKeyUsage=serverAuth,clientAuth\n");
    sign("foreign", "/CN=elsewhere",
         "subjectAltName=DNS:elsewhere.invalid\nextendedKeyUsage=serverAuth,clientAuth\n");
    sign("client", "/O=coordination", "extendedKeyUsage=clientAuth\n");
  }

  std::string file(const std::string& name) const { return folder_.file(name); }
  std::string ca() const { return file("ca.pem"); }
  std::string other_ca() const { return file("other-ca.pem"); }
  std::string client_cert() const { return file("client.pem"); }
  std::string client_key() const { return file("client.key"); }

  /// For etcd: TLS, and client certificates if `ask_client`. "foreign" is a server's certificate
  /// for another host.
  std::vector<std::string> etcd_flags(bool ask_client, const std::string& server = "server") const {
    std::vector<std::string> flags{"--cert-file=" + file(server + ".pem"),
                                   "--key-file=" + file(server + ".key")};
    if (ask_client) {
      flags.push_back("--client-cert-auth=true");
      flags.push_back("--trusted-ca-file=" + ca());
    }
    return flags;
  }

 private:
  static std::vector<std::string> new_key() {
    return {"-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"};
  }
  static void openssl(std::vector<std::string> args, const std::vector<std::string>& more) {
    args.insert(args.begin(), "openssl");
    args.insert(args.end(), more.begin(), more.end());
    const auto result = run(args);
    if (!result.ok()) throw std::runtime_error("openssl: " + result.out);
  }
  void make_ca(const std::string& name) const {
    openssl({"req", "-x509", "-days", "2", "-subj", "/CN=" + name, "-keyout", file(name + ".key"),
             "-out", file(name + ".pem")},
            new_key());
  }
  void sign(const std::string& name, const std::string& subject,
            const std::string& extensions) const {
    std::ofstream(file(name + ".ext")) << extensions;
    openssl({"req", "-new", "-subj", subject, "-keyout", file(name + ".key"), "-out",
             file(name + ".csr")},
            new_key());
    openssl({"x509", "-req", "-days", "2", "-in", file(name + ".csr"), "-CA", ca(), "-CAkey",
             file("ca.key"), "-CAcreateserial", "-extfile", file(name + ".ext"), "-out",
             file(name + ".pem")},
            {});
  }

  TempDir folder_;
};

}  // namespace support
