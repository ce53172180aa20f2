//! Hooks: a header and a body as they come, or signed rightly and then changed in one place. Nothing unsigned or out of its
//! time is believed; what is signed is, with one secret or the other.
#![no_main]

use libfuzzer_sys::fuzz_target;
use restcast::auth::hook::{HookError, verify};
use restcast::codec::proof::Signer;
use restcast::limits::HOOK_WINDOW;
use restcast::secret::Secret;
use restcast::time::WallTime;

const NOW_S: u64 = 1_795_350_000;

fuzz_target!(|data: &[u8]| {
    let Some((plan, rest)) = data.split_at_checked(6) else { return };
    let now = WallTime::from_secs(NOW_S);
    let secrets = [Secret::new([b'a'; 40]), Secret::new([b'b'; 40])];
    let signer = |which: usize| Signer::new("k", secrets[which].clone()).expect("it is long enough");
    if plan[0] & 1 == 0 {
        let at = rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len());
        let (header, body) = rest.split_at(at);
        let Ok(header) = std::str::from_utf8(header) else { return };
        let outcome = verify(header, body, &secrets, now);
        assert_eq!(outcome, verify(header, body, &secrets, now));
        if outcome.is_ok() {
            // `T` and a key after another kind of space are unknown keys, which may be there besides.
            let parts = header.split(',').map(|part| part.trim_matches([' ', '\t']));
            let times: Vec<&str> = parts.filter_map(|part| part.strip_prefix("t=")).collect();
            let [seconds] = times[..] else { panic!("{header} is believed with {} times", times.len()) };
            let lower = header.to_ascii_lowercase();
            let signed = (0..2).any(|which| lower.contains(&signer(which).sign(&[seconds.as_bytes(), b".", body])));
            assert!(signed, "{header} is believed of {body:?}");
        }
        assert!(verify(header, body, &[], now).is_err(), "without a secret there is no hook");
        return;
    }
    let which = usize::from(plan[0] >> 1 & 1);
    let away_s = u64::from(u16::from_be_bytes([plan[1], plan[2]]) % 700);
    let at_s = if plan[0] & 4 == 0 { NOW_S + away_s } else { NOW_S - away_s };
    let signature = signer(which).sign(&[at_s.to_string().as_bytes(), b".", rest]);
    let header = format!("t={at_s},v1={signature}");
    let outcome = verify(&header, rest, &secrets, now);
    if away_s > HOOK_WINDOW.as_secs() {
        return assert_eq!(outcome, Err(HookError::OutOfTime));
    }
    let mark = outcome.expect("it is signed");
    // Beside one of another secret, or in another order, it is the same hook.
    let (other, upper) = ("0".repeat(64), signature.to_ascii_uppercase());
    for same in [format!("t={at_s},v1={other},v1={signature}"), format!("v1={upper}, t={at_s},v0=x")] {
        assert_eq!(verify(&same, rest, &secrets, now), Ok(mark), "{same}");
    }
    let others: Vec<Secret> =
        secrets.iter().enumerate().filter(|(no, _)| *no != which).map(|(_, s)| s.clone()).collect();
    assert_eq!(verify(&header, rest, &others, now), Err(HookError::Unsigned));
    // One bit of the body, the time or the signature is another.
    let bit = 1 << (plan[3] & 7);
    let place = usize::from(u16::from_be_bytes([plan[4], plan[5]]));
    if !rest.is_empty() {
        let mut body = rest.to_vec();
        let place = place % body.len();
        body[place] ^= bit;
        assert_eq!(verify(&header, &body, &secrets, now), Err(HookError::Unsigned));
    }
    let mut bytes = header.clone().into_bytes();
    let place = place % bytes.len();
    bytes[place] ^= bit;
    if let Ok(changed) = std::str::from_utf8(&bytes)
        && !changed.eq_ignore_ascii_case(&header)
    {
        assert!(verify(changed, rest, &secrets, now).is_err(), "{changed} for {header}");
    }
});
