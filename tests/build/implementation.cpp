// The one .cpp of the compiled mode.
#define COORDINATION_IMPLEMENTATION
#include "coordination.hpp"
