// How many requests were answered, by path and status, and how many run: a part of the page for Prometheus.
#pragma once

#include <string>

// From any thread.
void        count_answer(const std::string & path, int status);
void        count_running(int more); // POST requests that were admitted, or have ended
std::string told_answers();          // in Prometheus' text format

// When a server is started.
void forget_answers();
