/* SPDX-License-Identifier: Apache-2.0 */
/* Prints all addresses of a name as the C library finds them, one a line; exit status 1 where it finds none. */

#define _POSIX_C_SOURCE 200112L
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <sys/socket.h>

int main(int argc, char **argv)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM };
	struct addrinfo *found;
	char text[INET6_ADDRSTRLEN];

	if (argc != 2 || getaddrinfo(argv[1], "80", &hints, &found))
		return 1;
	for (struct addrinfo *each = found; each; each = each->ai_next) {
		const void *address = each->ai_family == AF_INET
			? (const void *)&((struct sockaddr_in *)each->ai_addr)->sin_addr
			: (const void *)&((struct sockaddr_in6 *)each->ai_addr)->sin6_addr;
		puts(inet_ntop(each->ai_family, address, text, sizeof text));
	}
	freeaddrinfo(found);
	return 0;
}
