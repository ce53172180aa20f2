//! The first of a host's addresses that answers, directly or through a proxy.
//!
//! Source: RFC 8305 (Happy Eyeballs): section 4 for the order, section 5 for the stagger.
//! Memory: one socket per attempt under way, at most `limits::RESOLVER_ADDRESSES_MAX`; losers are cancelled and closed.
//! Errors: the last attempt's.  Not here: time-outs (the caller's), names (`runtime::resolver`), TLS.

use std::future::{Future, poll_fn};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::task::Poll;

use monoio::net::TcpStream;
use monoio::time::sleep;

use crate::limits::CONNECT_STAGGER;

/// Connects to `port` of the first of `addresses` that answers, as [`first_of`] says.
///
/// # Errors
/// The last attempt's, once all have failed.
pub(super) async fn connect(addresses: &[IpAddr], port: u16) -> io::Result<TcpStream> {
    let attempts = interleaved(addresses).into_iter().map(|ip| TcpStream::connect_addr(SocketAddr::new(ip, port)));
    let stream = first_of(attempts, io::Error::from(io::ErrorKind::AddrNotAvailable)).await?;
    // A request is one write, and waits for nothing.
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The first of `attempts` that succeeds: each gets [`CONNECT_STAGGER`], or until it fails, before the next is begun beside it,
/// so that none is kept from the others by one that hangs. Dropping the future, and winning, ends all others.
///
/// # Errors
/// The last attempt's, once all have failed; `none` where there is none.
pub(super) async fn first_of<T, E, F>(attempts: impl ExactSizeIterator<Item = F>, none: E) -> Result<T, E>
where
    F: Future<Output = Result<T, E>>,
{
    let mut untried = attempts;
    let mut attempts: Vec<Pin<Box<F>>> = Vec::new();
    let mut failure = none;
    loop {
        if let Some(attempt) = untried.next() {
            attempts.push(Box::pin(attempt));
        } else if attempts.is_empty() {
            return Err(failure);
        }
        let mut stagger = pin!(sleep(CONNECT_STAGGER));
        let more = untried.len() > 0;
        let turn = poll_fn(|cx| {
            let mut failed = None;
            let mut won = None;
            attempts.retain_mut(|attempt| {
                if won.is_some() {
                    return true;
                }
                match attempt.as_mut().poll(cx) {
                    Poll::Pending => true,
                    Poll::Ready(Ok(opened)) => {
                        won = Some(opened);
                        false
                    }
                    Poll::Ready(Err(error)) => {
                        failed = Some(error);
                        false
                    }
                }
            });
            match (won, failed) {
                (Some(opened), _) => Poll::Ready(Turn::Won(opened)),
                (None, Some(error)) => Poll::Ready(Turn::Failed(error)),
                (None, None) if more => stagger.as_mut().poll(cx).map(|()| Turn::Slow),
                (None, None) => Poll::Pending,
            }
        });
        match turn.await {
            Turn::Won(opened) => return Ok(opened),
            Turn::Failed(error) => failure = error,
            Turn::Slow => {}
        }
    }
}

enum Turn<T, E> {
    Won(T),
    Failed(E),
    Slow,
}

/// RFC 8305 section 4: the families take turns, the first address's family first, the order within each kept.
pub(super) fn interleaved(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let first_is_v6 = addresses.first().is_some_and(IpAddr::is_ipv6);
    let (first, second): (Vec<IpAddr>, Vec<IpAddr>) = addresses.iter().partition(|ip| ip.is_ipv6() == first_is_v6);
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let mut order = Vec::with_capacity(addresses.len());
    loop {
        let pair = [first.next(), second.next()];
        if pair == [None, None] {
            return order;
        }
        order.extend(pair.into_iter().flatten());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_take_turns_and_the_first_stays_first() {
        let ips = |text: &str| text.split(' ').map(|ip| ip.parse().expect("an address")).collect::<Vec<IpAddr>>();
        assert_eq!(interleaved(&ips("::1 ::2 ::3 1.1.1.1 1.1.1.2")), ips("::1 1.1.1.1 ::2 1.1.1.2 ::3"));
        assert_eq!(interleaved(&ips("1.1.1.1 1.1.1.2 ::1")), ips("1.1.1.1 ::1 1.1.1.2"));
        assert_eq!(interleaved(&ips("1.1.1.1")), ips("1.1.1.1"));
        assert!(interleaved(&[]).is_empty());
    }
}
