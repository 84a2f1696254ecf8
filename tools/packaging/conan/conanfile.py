"""coordination.hpp for Conan 2: `conan create tools/packaging/conan` at the top of the sources."""
import os
import re

from conan import ConanFile
from conan.tools.cmake import CMake, CMakeDeps, CMakeToolchain, cmake_layout
from conan.tools.files import copy, load


class Coordination(ConanFile):
    name = "coordination"
    description = "Locks, service discovery and configuration on etcd, in one header"
    license = "MIT"
    topics = ("etcd", "distributed-lock", "service-discovery", "header-only")
    package_type = "header-library"
    settings = "os", "arch", "compiler", "build_type"

    def _top(self):
        return os.path.join(self.recipe_folder, "..", "..", "..")

    def set_version(self):
        header = load(self, os.path.join(self._top(), "coordination.hpp"))
        self.version = ".".join(re.findall(r"#define COORDINATION_VERSION_[A-Z]+ (\d+)", header))

    def export_sources(self):
        for name in ("coordination.hpp", "CMakeLists.txt", "LICENSE", "tools/packaging/*"):
            copy(self, name, self._top(), self.export_sources_folder)

    def requirements(self):
        self.requires("cpp-httplib/[>=0.11]", options={"with_openssl": True},
                      transitive_headers=True, transitive_libs=True)
        self.requires("nlohmann_json/[>=3.7]", transitive_headers=True)
        self.requires("openssl/[>=1.1 <4]", transitive_headers=True, transitive_libs=True)

    def layout(self):
        cmake_layout(self)

    def generate(self):
        CMakeDeps(self).generate()
        toolchain = CMakeToolchain(self)
        for part in ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_TOOLS", "INSTALL_COMPILED"):
            toolchain.cache_variables[f"COORDINATION_{part}"] = False
        toolchain.generate()

    def package(self):
        cmake = CMake(self)
        cmake.configure()
        cmake.install()
        copy(self, "LICENSE", self.source_folder, os.path.join(self.package_folder, "licenses"))

    def package_id(self):
        self.info.clear()

    def package_info(self):
        # The package's own CMake files say what is linked, and build coordination::compiled.
        self.cpp_info.set_property("cmake_find_mode", "none")
        self.cpp_info.builddirs = ["share/cmake/coordination"]
        self.cpp_info.libdirs = []
        self.cpp_info.bindirs = []
