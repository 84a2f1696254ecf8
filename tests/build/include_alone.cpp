// The header needs nothing before it, and nobody pays for what he does not use.
#include "coordination.hpp"
