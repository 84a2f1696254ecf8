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

  /// name.pem and name.key, signed by `ca`.
  void sign(const std::string& name, const std::string& subject, const std::string& extensions,
            const std::string& ca = "ca") const {
    request(name, subject, extensions);
    openssl({"x509", "-req", "-days", "2", "-in", file(name + ".csr"), "-CA", file(ca + ".pem"),
             "-CAkey", file(ca + ".key"), "-CAcreateserial", "-extfile", file(name + ".ext"),
             "-out", file(name + ".pem")},
            {});
  }
  /// The same with dates as 20400101000000Z.
  void sign_for(const std::string& name, const std::string& subject, const std::string& extensions,
                const std::string& from, const std::string& until) const {
    request(name, subject, extensions);
    std::ofstream(file("index.txt")) << "";
    std::ofstream(file("serial")) << "1000\n";
    std::ofstream(file("ca.cnf"))
        << "[ca]\ndefault_ca=d\n[d]\ndatabase=" << file("index.txt")
        << "\nserial=" << file("serial") << "\nnew_certs_dir=" << folder_.path()
        << "\ndefault_md=sha256\npolicy=p\n[p]\ncommonName=optional\norganizationName=optional\n";
    openssl({"ca", "-batch", "-config", file("ca.cnf"), "-cert", ca(), "-keyfile", file("ca.key"),
             "-in", file(name + ".csr"), "-out", file(name + ".pem"), "-startdate", from,
             "-enddate", until, "-extfile", file(name + ".ext"), "-notext"},
            {});
  }
  /// A copy of name.key that needs a password.
  void lock_key(const std::string& name, const std::string& password) const {
    openssl({"pkcs8", "-topk8", "-in", file(name + ".key"), "-out", file(name + ".locked"),
             "-passout", "pass:" + password},
            {});
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
  void request(const std::string& name, const std::string& subject,
               const std::string& extensions) const {
    std::ofstream(file(name + ".ext")) << extensions;
    openssl({"req", "-new", "-subj", subject, "-keyout", file(name + ".key"), "-out",
             file(name + ".csr")},
            new_key());
  }

  TempDir folder_;
};

}  // namespace support
