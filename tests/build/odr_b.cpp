// Includes it twice.
#include "coordination.hpp"

// Once more.
#include "coordination.hpp"

std::string from_b();
std::string from_b() { return coordination::to_string(coordination::ErrorCode::Timeout); }
