//! Datagrams by a network stack, there and back.

use crate::guest::{Clock, Control, cycles, wait};
use crate::net::Card;
use io_guest::*;
use smoltcp::iface::{Config, Interface, SocketSet, SocketStorage};
use smoltcp::socket::udp::{PacketBuffer, PacketMetadata, Socket};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr, IpEndpoint, Ipv4Address};

const fn address([a, b, c, d]: [u8; 4]) -> IpAddress {
    IpAddress::Ipv4(Ipv4Address::new(a, b, c, d))
}

/// The time for the stack, which only needs it for what did not come in seconds: a thousand cycles are a microsecond,
/// or less.
fn now() -> Instant {
    Instant::from_micros((cycles() / 1000) as i64)
}

/// Sends datagrams to the responder, one after the other, and compares what comes back byte by byte.
pub fn run(card: &mut Card<'_>, case: &Case, control: &Control<'_>, report: &mut Report) -> Result<(), u64> {
    let size = case.size as usize;
    if case.count == 0 || size == 0 || size > MAX_DATAGRAM {
        return Err(failure::CASE);
    }
    let mut config = Config::new(EthernetAddress(card.driver.mac_address()).into());
    config.random_seed = cycles();
    let mut interface = Interface::new(config, &mut card.driver, now());
    // The list has room for more than one.
    interface.update_ip_addrs(|addresses| {
        let _ = addresses.push(IpCidr::new(address(GUEST_IP), 24));
    });

    let (mut receive, mut send) = ([0; MAX_DATAGRAM], [0; MAX_DATAGRAM]);
    let (mut receive_meta, mut send_meta) = ([PacketMetadata::EMPTY], [PacketMetadata::EMPTY]);
    let mut socket = Socket::new(
        PacketBuffer::new(&mut receive_meta[..], &mut receive[..]),
        PacketBuffer::new(&mut send_meta[..], &mut send[..]),
    );
    socket.bind(49152).map_err(|_| failure::CASE)?;
    let mut storage = [SocketStorage::EMPTY];
    let mut sockets = SocketSet::new(&mut storage[..]);
    let handle = sockets.add(socket);

    let clock = Clock::start(control);
    let mut datagram = [0; MAX_DATAGRAM];
    let mut exchange = || {
        for index in 0..case.count {
            for (at, byte) in datagram[..size].iter_mut().enumerate() {
                *byte = at as u8 ^ index as u8 ^ case.sequence as u8;
            }
            let to = IpEndpoint::new(address(RESPONDER_IP), ECHO_PORT);
            let socket = sockets.get_mut::<Socket<'_>>(handle);
            socket.send_slice(&datagram[..size], to).map_err(|_| failure::DEVICE)?;
            let same = wait(|| {
                interface.poll(now(), &mut card.driver, &mut sockets);
                if card.driver.broken().is_some() {
                    return Err(failure::DEVICE);
                }
                let socket = sockets.get_mut::<Socket<'_>>(handle);
                Ok(socket.recv().ok().map(|(back, from)| back == &datagram[..size] && from.endpoint == to))
            })?;
            if !same {
                return Err(failure::CONTENTS);
            }
            report.ios += 1;
            report.bytes += size as u64;
            report.compared += size as u64;
        }
        Ok(())
    };
    let done = exchange();
    clock.stop(report);
    done?;
    wait(|| Ok(card.driver.all_sent().map_err(|_| failure::DEVICE)?.then_some(())))?;
    card.prepare();
    Ok(())
}
