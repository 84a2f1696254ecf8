#include "coordination.hpp"

std::string from_b();
std::string from_b() { return coordination::to_string(coordination::ErrorCode::Conflict); }
