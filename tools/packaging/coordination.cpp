// The one file of the compiled form.
#define COORDINATION_IMPLEMENTATION
#include <coordination.hpp>
